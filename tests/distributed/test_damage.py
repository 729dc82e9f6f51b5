"""Files of a run that are torn, flipped or missing: the reaction of the next start to each."""

import os
import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from pmp_ds.run_dir import RunDir
from pmp_ds.state import shelf
from tests.helpers.faults import seen
from tests.helpers.lives import checkpoints, same_end
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.fixture
def ended(calm: RunDir, run: RunDir) -> RunDir:
    """Return a copy of the undisturbed run."""
    shutil.copytree(calm.root, run.root)
    return run


@pytest.fixture
def halfway(ended: RunDir) -> RunDir:
    """Return a copy of the run after update 8."""
    shutil.rmtree(ended.checkpoints / "update-00000012")
    return ended


FILES = (
    "manifest.json",
    "state/rank-00000.safetensors",
    "state/rank-00001.safetensors",
    "weights/config.json",
    "weights/model.safetensors",
)


@pytest.mark.parametrize(
    ("fault", "damage"), [("torn write", tear), ("bit flip", flip), ("missing shard", Path.unlink)]
)
def test_checkpoint(lives, ended, calm, capsys, fault, damage: Callable[[Path], None]):
    """Damage every file of a checkpoint; the last one is followed by a whole run."""
    newest = ended.checkpoints / "update-00000012"
    assert sorted(str(p.relative_to(newest)) for p in newest.rglob("*.*")) == list(FILES)
    for name in FILES:
        intact = (newest / name).read_bytes()
        damage(newest / name)
        found = shelf.find(ended)
        assert found is not None
        assert found[1].step == 8
        assert name in capsys.readouterr().out
        if name != FILES[-1]:
            (newest / name).write_bytes(intact)
    one, _ = lives()
    seen(fault, one.code, one.out)
    assert "resuming after update 8" in one.out
    assert f"set aside as {newest}.damaged\n" in one.out
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    same_end(calm, ended)


class _Program:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(
    "name",
    daily(
        [
            "weights/pytorch_model.bin",
            "weights/model-2.safetensors",
            "state/rank-00002.safetensors",
            "state/zero_pp_rank_0_optim_states.pt",
        ],
        ["weights/pytorch_model.bin", "state/rank-00002.safetensors"],
    ),
)
def test_program_in_a_checkpoint(lives, ended, calm, tmp_path, name):
    """A file whose hash is not in the manifest is not opened, let alone unpickled."""
    mark, newest = tmp_path / "was run", ended.checkpoints / "update-00000012"
    (newest / name).write_bytes(pickle.dumps(_Program(mark)))
    one, _ = lives()
    seen("foreign file", one.code, one.out)
    assert not mark.exists()
    same_end(calm, ended)
    assert not (newest / name).exists()


@pytest.mark.parametrize("text", ["", None])
def test_latest(lives, ended, text):
    latest = ended.checkpoints / "latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    one, _ = lives()
    seen("latest", one.code, one.err)
    assert "already finished" in one.out
    assert latest.read_text() == "update-00000012\n"


@pytest.mark.parametrize(
    ("damage", "name"),
    daily(
        product([tear, flip], ["ticket.json", "mask.safetensors"]),
        [(tear, "ticket.json"), (flip, "mask.safetensors")],
    ),
)
def test_ticket(lives, halfway, damage, name):
    damage(halfway.ticket / name)
    one, _ = lives()
    seen("ticket", one.code, one.err)
    assert checkpoints(halfway) == [8]


@pytest.mark.parametrize("damage", daily([tear, flip, Path.unlink], [flip]))
def test_store(lives, halfway, work, tmp_path, damage):
    store = Path(shutil.copytree(work / "store", tmp_path / "store"))
    damage(next((store / "train").glob("*.arrow")))
    one, _ = lives("--data.store", str(store))
    seen("store", one.code, one.err)
    assert checkpoints(halfway) == [8]


def test_metrics(lives, halfway, calm):
    text = halfway.metrics.read_text()
    halfway.metrics.write_text(text[: text.index('"step": 10') + 8])
    one, _ = lives()
    seen("metrics", one.code, one.err)
    same_end(calm, halfway)


def test_what_killed_processes_left_is_swept(lives, halfway, calm):
    """Partial files of every kind are removed, and none is used."""
    shutil.copytree(
        halfway.checkpoints / "update-00000008", halfway.checkpoints / "update-00000011.incomplete"
    )
    for folder in (halfway.root, halfway.ticket, halfway.init, halfway.checkpoints):
        (folder / ".name.123.incomplete").write_text("half")
    assert lives()[0].code == 0
    same_end(calm, halfway)


@pytest.mark.parametrize(
    ("damage", "name"),
    daily(
        product([tear, flip], ["config.yaml", "data.json", "private/init/theta0.json"]),
        [(tear, "config.yaml"), (flip, "data.json"), (tear, "private/init/theta0.json")],
    ),
)
def test_facts(lives, halfway, damage, name):
    damage(halfway.root / name)
    one, _ = lives()
    seen("facts", one.code, one.err)
    assert checkpoints(halfway) == [8]
