"""Several nodes on one folder give the store of one machine, to the byte, whatever happens."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.commands import prepare_data
from pmp_ds.errors import UserError
from pmp_ds.prepare import corpus as corpus_module
from pmp_ds.prepare import nodes, planning, staging
from pmp_ds.prepare.cluster import FinishStore, PackUnits
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.units import pack_unit
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.processes

REPO = Path(__file__).parents[3]

# Each of the six files is larger than half a unit.
COMMAND = """
import os, signal, sys
from pmp_ds.prepare import corpus, units
corpus._MIN_UNIT_BYTES = 40_000
{extra}
from pmp_ds.commands.prepare_data import main
from pmp_ds.errors import exit_code
if __name__ == "__main__":
    raise SystemExit(exit_code(main))
"""
VERB = """
if __name__ == "__main__":
    assert sys.argv.pop(1) == "prepare-data"
"""
DIES = """
def killed(job, unit, result, record=units._record):
    if unit.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    record(job, unit, result)
units._record = killed
"""

# What the documented example requires of SLURM: an array, a dependency, a printed number.
SBATCH = """#!/usr/bin/env python3
import os, pathlib, subprocess, sys
options = dict(word.partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
ended_well = pathlib.Path("jobs-that-ended-well")
for job in filter(None, [options.get("--dependency", "").removeprefix("afterok:")]):
    assert job in ended_well.read_text().split()
script = sys.argv[sys.argv.index("--wrap") + 1]
last = int(options.get("--array", "0-0").removeprefix("0-"))
tasks = [
    subprocess.Popen(["sh", "-c", script], stdout=2, env=os.environ | {
        "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(last + 1)})
    for task in range(last + 1)
]
codes = [task.wait() for task in tasks]
if any(codes):
    sys.exit(1)
with open(ended_well, "a") as file:
    print(os.getpid(), file=file)
print(os.getpid())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Return a corpus of six units, and the store that one process makes of it."""
    root = tmp_path_factory.mktemp("nodes")
    (root / "corpus").mkdir()
    texts = make_texts(240)
    for part in range(6):
        rows = [json.dumps({"text": text}) for text in texts[part::6]]
        rows += ["{"] if part == 3 else []
        (root / "corpus" / f"{part}.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_MIN_UNIT_BYTES", 40_000)
        patch.chdir(root)
        prepare(config("one"))
    return root, contents(root / "one")


@pytest.fixture
def folder(made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a working folder of its own with the corpus in it."""
    shutil.copytree(made[0] / "corpus", tmp_path / "corpus")  # with the dates
    monkeypatch.setattr(corpus_module, "_MIN_UNIT_BYTES", 40_000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def expected(made) -> dict[str, bytes]:
    return made[1]


def config(out: str, **changes) -> PrepareConfig:
    settings: dict[str, Any] = {
        "input": ("corpus",),
        "out": out,
        "train_vocab_size": 400,
        "block_size": 16,
        "val_fraction": 0.1,
        "workers": 1,
    }
    return PrepareConfig(**(settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(folder: Path, *arguments: str, extra: str = "") -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(COMMAND.format(extra=extra))
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPO)}


def documented(language: str) -> str:
    """Return the one code block of this language in the description of the data."""
    text = (REPO / "tokenized_data" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return block


@pytest.mark.nightly
def test_documented_slurm_example(folder: Path, expected):
    """The example unchanged, with two nodes at once and an sbatch that waits."""
    (folder / "bin").mkdir()
    (folder / "bin" / "pmp-ds").write_text(f"#!{sys.executable}\n" + COMMAND.format(extra=VERB))
    (folder / "bin" / "pmp-ds").chmod(0o755)
    (folder / "bin" / "sbatch").write_text(SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    (folder / "big.yaml").write_text(
        "{input: [corpus], train_vocab_size: 400, block_size: 16, val_fraction: 0.1, workers: 1}"
    )
    example = documented("bash").replace("nodes=64", "nodes=2")
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", example],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment() | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("packed: 3 units") == 2
    assert contents(folder / "tokenized_data" / "big") == expected


@pytest.mark.nightly  # its steps, as an executor calls them: test_steps_of_datatrove
def test_documented_datatrove_example(folder: Path, expected):
    """The same pipeline under the local executor: two tasks, each a process of its own."""
    nodes.plan(config("tokenized_data/big"))
    example = documented("python").replace("SlurmPipelineExecutor", "LocalPipelineExecutor")
    example = re.sub(r"(?m)^slurm = .*$", "slurm = {}", example).replace("tasks=64", "tasks=2")
    start = "from pmp_ds.prepare import corpus\ncorpus._MIN_UNIT_BYTES = 40_000\n"
    body = example.replace("\n", "\n    ")
    (folder / "script.py").write_text(f"{start}if __name__ == '__main__':\n    {body}\n")
    done = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert contents(folder / "tokenized_data" / "big") == expected
    stats = json.loads((folder / "logs/pack/stats.json").read_text())
    units = next(step for step in stats if "pack units" in step["name"])["stats"]["units"]
    assert (units["total"], units["n"]) == (6, 2)


def test_steps_of_datatrove(folder: Path, expected):
    """Make an executor's calls on each of two tasks, and then on one; documents pass through."""
    nodes.plan(config("out"))
    for rank in (0, 1):
        step = PackUnits("out", workers=1)
        assert list(step.run(iter(["a document"]), rank, 2)) == ["a document"]
        assert step.stats["units"].total == 3
    assert list(FinishStore("out").run(None, 1, 2)) == []
    assert not Path("out").exists()
    assert list(FinishStore("out").run(None, 0, 2)) == []
    assert contents(folder / "out") == expected


def test_killed_node_is_repeated_and_finish_waits_for_all(folder: Path, expected, capsys):
    assert nodes.plan(config("out")) == 6
    share = ("pack", "out", "--node", "0", "--nodes", "2")
    assert command(folder, *share, extra=DIES).returncode == -signal.SIGKILL
    assert list((folder / "out.incomplete/train").glob("00002-*"))  # but not in the ledger
    with pytest.raises(UserError, match=r"5 of 6 units are missing in .*: 1, 2, 3, 4, 5; .*pack"):
        nodes.finish(Path("out"))
    prepare_data.main(share)
    assert "packed: 2 units, 1 of this node's 3 were there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"3 of 6 units are missing"):
        prepare_data.main(["finish", "out"])
    assert nodes.pack(Path("out")).packed == 3  # without numbers: whatever is missing
    assert not nodes.finish(Path("out")).reused
    assert contents(folder / "out") == expected
    assert not (folder / "out.incomplete").exists()


def test_late_commands_change_nothing(folder: Path, expected):
    nodes.plan(config("out"))
    nodes.pack(Path("out"))
    assert nodes.plan(config("out")) == 6  # once more: everything is kept
    assert nodes.pack(Path("out")).packed == 0
    shard = (folder / "out.incomplete/train/00003-000.arrow").stat().st_ino
    summary = nodes.finish(Path("out"))
    assert "tokens/s" not in str(summary)  # nobody took the time of all nodes together
    assert (folder / "out/train/00003-000.arrow").stat().st_ino == shard  # named, not written again
    assert nodes.plan(config("out")) == 0
    assert str(nodes.pack(Path("out"), 1, 2)).startswith("packed: 0 units")
    assert nodes.finish(Path("out")).reused
    with pytest.raises(UserError, match="contains another store"):
        nodes.plan(config("out", block_size=8))
    assert contents(folder / "out") == expected


def test_late_node_of_another_plan_cannot_spoil_this_one(folder: Path, expected):
    nodes.plan(config("out", block_size=8))
    late, units = planning.read_plan(Path("out"))
    nodes.plan(config("out"))  # other settings: starts over
    nodes.pack(Path("out"))
    pack_unit(late, units[4])
    with pytest.raises(UserError, match=r"1 of 6 units are missing in .*: 4;"):
        nodes.finish(Path("out"))
    nodes.pack(Path("out"))
    nodes.finish(Path("out"))
    assert contents(folder / "out") == expected


def test_one_machine_takes_over_what_nodes_left(folder: Path, expected):
    nodes.plan(config("out"))
    nodes.pack(Path("out"), 1, 3)
    prepare(config("out"))
    assert contents(folder / "out") == expected


def test_bad_rows_of_all_nodes_count_together(folder: Path):
    nodes.plan(config("out", max_malformed=0.001))
    nodes.pack(Path("out"))
    with pytest.raises(UserError, match=r"1 of 241 rows are malformed.*3\.jsonl:41"):
        nodes.finish(Path("out"))
    nodes.plan(config("out", max_malformed=0.01))
    assert nodes.finish(Path("out")).manifest["rows"]["malformed"] == 1  # nothing packed again


def test_refusals_say_what_to_do(folder: Path):
    for act in (nodes.pack, nodes.finish):
        with pytest.raises(UserError, match=r"contains no plan: run .* plan --out out"):
            act(Path("out"))
    with pytest.raises(UserError, match=r"node=2 must be from 0 to nodes - 1 = 1"):
        nodes.pack(Path("out"), 2, 2)
    with pytest.raises(UserError, match=r"hf:corpus is a stream.*download"):
        nodes.plan(config("out", input=("hf:corpus",)))
    assert not (folder / "out.incomplete").exists()
    nodes.plan(config("out"))
    os.utime("corpus/0.jsonl", (1, 1))
    with pytest.raises(UserError, match=r"input files .* are \w+ in the plan and \w+ here"):
        nodes.pack(Path("out"))
    nodes.plan(config("out"))
    identity = json.loads(Path("out.incomplete/run.json").read_text())
    identity["versions"]["tokenizers"] = "0.1"
    Path("out.incomplete/run.json").write_text(json.dumps(identity))
    with pytest.raises(UserError, match=r"library versions are .*'tokenizers': '0\.1'"):
        nodes.pack(Path("out"))
    nodes.plan(config("out"))
    Path("out.incomplete/tokenizer/tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="tokenizer is not as it was planned"):
        nodes.pack(Path("out"))


@pytest.mark.parametrize("command", [prepare, nodes.plan])
def test_a_store_in_the_making_has_one_maker(folder: Path, command):
    with staging.held(Path("out")), pytest.raises(UserError, match="the store out is in use by "):
        command(config("out"))
    assert not Path("out.incomplete").exists()
    command(config("out"))
    assert not list(folder.glob(".out.lease*"))


def test_leftovers_of_a_kill_behind_the_renaming_go(folder: Path, expected):
    prepare(config("out"))
    for name in ("units", "spool"):
        (folder / "out" / name).mkdir()
        (folder / "out" / name / "x").touch()
    (folder / "out" / "plan.json").touch()
    assert prepare(config("out")).reused
    assert contents(folder / "out") == expected
