"""The pip installation is complete: it trains with the compiled kernel and knows its commit."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pmp_ds.optim.kernels import compiler
from pmp_ds.version import COMMIT_VARIABLE
from tests.helpers.commands import LAUNCHER, Done, ok
from tests.helpers.distributed import REPO
from tests.helpers.faults import seen
from tests.helpers.workdir import SHORT, write_corpus

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("git") is None, reason="no git"),
    pytest.mark.skipif(compiler.library() is None, reason="no C++ compiler"),
]

FOLDERS = ("pmp_ds", "launcher", "ds_configs")
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")

COUNTED = """
import atexit, runpy, sys
import pmp_ds
from pmp_ds.optim.kernels import cpu
from pmp_ds.version import code_version
operator, calls = cpu.masked_adamw, []
def counted(batch, coefficients, factor):
    calls.append(1)
    operator(batch, coefficients, factor)
cpu.masked_adamw = counted
atexit.register(lambda: print(pmp_ds.__file__, len(calls), code_version().commit, sep="|"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True)
class Built:
    """Hold a commit of a copy of the sources, and its built archives."""

    commit: str
    sdist: Path
    wheel: Path
    """Built from the source archive, as a packager does."""


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Done:
    hidden = {"PYTHONPATH", COMMIT_VARIABLE}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | (env or {}),
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=240,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:
        shutil.copytree(REPO / name, source / name, ignore=NOT_SOURCE)
    for path in REPO.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        ok(call(*git, *words, cwd=source))
    commit = ok(call(*git, "rev-parse", "--short=12", "HEAD", cwd=source)).stdout.strip()

    build = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    ok(call(sys.executable, "-c", build, cwd=source))
    (sdist,) = dist.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", dist)
    ok(call(*pip, sdist, cwd=dist))
    (wheel,) = dist.glob("*.whl")
    return Built(commit, sdist, wheel)


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel that takes only its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    ok(call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    ok(call(*pip, built.wheel, cwd=folder))
    (packages,) = folder.glob("lib/python*/site-packages")
    theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # A path alone: the files there that make pmp_ds importable from a checkout are not read.
    (packages / "dependencies.pth").write_text("\n".join(theirs))
    return python


def files_of(folder: str) -> set[str]:
    """Return every source file below, whatever its kind."""
    files = (path for path in (REPO / folder).rglob("*") if path.is_file())
    return {
        str(path.relative_to(REPO))
        for path in files
        if "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_contents(built: Built):
    """The wheel has the package and the commit; the archive also has the launchers and their
    files."""
    package = files_of("pmp_ds") | {"pmp_ds/COMMIT"}
    recipes = {f"pmp_ds/recipes/{p.name}" for p in (REPO / "launcher/recipes").iterdir()}
    ds_configs = {f"pmp_ds/ds_configs/{p.name}" for p in (REPO / "ds_configs").glob("*.json")}
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == package | recipes | ds_configs
        assert wheel.read("pmp_ds/COMMIT").decode().strip() == built.commit
    with tarfile.open(built.sdist) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert names >= package | files_of("launcher") | files_of("ds_configs")
    assert [name for name in names if name.startswith(("runs/", "tokenized_data/"))] == []


@pytest.mark.nightly
def test_trains_with_the_compiled_kernel(python: Path, built: Built, work: Path, tmp_path: Path):
    for name in ("tiny.yaml", "zero1.json"):
        shutil.copy(work / name, tmp_path)
    (tmp_path / "store").symlink_to(work / "store")
    done = train(python, tmp_path, *SHORT)
    assert "many times slower" not in done.stderr
    package, calls, commit = done.stdout.splitlines()[-1].split("|")
    assert Path(package).is_relative_to(python.parents[1])
    assert int(calls) >= 6
    assert commit == built.commit
    (compiled,) = (tmp_path / "cache" / "pmp_ds").iterdir()
    assert compiled.suffix == ".so"


@pytest.mark.nightly
def test_without_the_kernels_source(python: Path, work: Path, tmp_path: Path):
    """It is slow and says why; the compiler is not blamed."""
    for name in ("tiny.yaml", "zero1.json"):
        shutil.copy(work / name, tmp_path)
    (tmp_path / "store").symlink_to(work / "store")
    (source,) = python.parents[1].glob("lib/*/site-packages/pmp_ds/optim/kernels/*.cpp")
    hidden = source.rename(source.with_suffix(".hidden"))
    try:
        done = train(python, tmp_path, *SHORT)
    finally:
        hidden.rename(source)
    seen("no kernel source", done.returncode, done.stdout + done.stderr)
    assert "g++" not in done.stderr
    assert done.stdout.splitlines()[-1].split("|")[1] == "0"


def train(python: Path, cwd: Path, *flags: str) -> Done:
    tiny = ("--config", "tiny.yaml", "--mask.max_steps", "4", "--mask.on_unstable", "last")
    environment = {
        "XDG_CACHE_HOME": str(cwd / "cache"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return ok(
        call(
            python,
            "-c",
            COUNTED,
            LAUNCHER / "pretrain.py",
            *tiny,
            *flags,
            "--deepspeed-config",
            "zero1.json",
            cwd=cwd,
            env=environment,
        )
    )


def pmp_ds(python: Path, cwd: Path, line: str, ranks: bool = False) -> str:
    """Return the output of the wheel's console command for a line of words."""
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd)}
    start = [str(python), "-m", "pmp_ds.launch", "--ranks", "1"]
    words = start if ranks else [str(python.with_name("pmp-ds"))]
    return ok(call(*words, *line.split(), cwd=cwd, env=environment)).stdout


@pytest.mark.nightly
@pytest.mark.timeout(900)  # five commands, each of which imports torch
def test_the_short_demo_from_an_empty_folder(python: Path, tmp_path: Path):
    """Recipes, DeepSpeed files and commands all come from the wheel."""
    write_corpus(tmp_path / "corpus.jsonl")
    small = "--input corpus.jsonl --train-vocab-size 400 --block-size 256 --val-fraction 0.05"
    pmp_ds(python, tmp_path, f"prepare-data {small} --out tokenized_data/demo")
    short = "--train.steps 4 --train.warmup-steps 1 --mask.max_steps 3 --mask.on_unstable last"
    short += " --run.val-blocks 2 --train.global-batch-size 4 --train.micro-batch-size 4"
    train = f"pretrain --config demo --deepspeed-config zero2 {short}"
    said = pmp_ds(python, tmp_path, train, ranks=True)
    assert "next: pmp-ds export --run runs/demo" in said
    pmp_ds(python, tmp_path, "export --run runs/demo")
    report = pmp_ds(python, tmp_path, "report --run runs/demo")
    assert "elements changed in 4 updates" in report
    assert (tmp_path / "runs/demo/release/model.safetensors").is_file()
    assert "54 steps, 54 to do" in pmp_ds(python, tmp_path, "study --config study-small --plan")
