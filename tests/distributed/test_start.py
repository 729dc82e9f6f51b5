"""An existing run never starts over by itself: each case is refused, and a refused start leaves
every file unchanged."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from unittest import mock

import pytest

from pmp_ds import dist, formats
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import weights_digest
from pmp_ds.run_dir import RunDir
from pmp_ds.state import shelf, theta0
from pmp_ds.summary import summarize
from pmp_ds.version import code_version
from tests.distributed.test_damage import flip
from tests.helpers import tiny
from tests.helpers.commands import files_of
from tests.helpers.faults import seen
from tests.helpers.lives import Life, checkpoints, same_end
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

AFRESH = "--start-afresh"
SECRET = ("--init.seed", "null", "--train.steps", "4", "--train.warmup_steps", "0")


@pytest.fixture
def ended(calm: RunDir, run: RunDir) -> RunDir:
    """Return a copy of the undisturbed run; checkpoints of updates 8 and 12."""
    shutil.copytree(calm.root, run.root)
    return run


@pytest.fixture
def refused(lives, run) -> Callable[..., Life]:
    """Check that a start fails with a mistake and changes nothing, however often it is repeated."""

    def start(*flags: str) -> Life:
        before = files_of(run.root)
        one, _ = lives(*flags)
        assert one.code == 1, one
        assert files_of(run.root) == before
        return one

    return start


def spoil(run: RunDir) -> None:
    """Flip a bit in a file of each checkpoint."""
    for step in (8, 12):
        flip(run.checkpoints / f"update-{step:08d}" / "weights" / "model.safetensors")


def another_format(folder: Path) -> None:
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    now = f'"format_version": {formats.current("checkpoint")}'
    assert now in text
    manifest.write_text(text.replace(now, '"format_version": 1'))


def test_none_can_be_read(refused, lives, ended, calm):
    """The start is refused twice; started over on request, it keeps everything."""
    spoil(ended)
    metrics = ended.metrics.read_bytes()
    for _ in range(2):
        one = refused()
        seen("unreadable", one.code, one.err)
    assert one.err.count("error: ") == 1
    one, _ = lives(AFRESH)
    aside = ended.private / "checkpoints.unreadable-1"
    assert (one.code, f"{AFRESH}: set aside as {aside}\n" in one.out) == (0, True)
    assert {path.name for path in aside.iterdir()} == {
        "update-00000008",
        "update-00000012",
        "latest",
        "metrics.jsonl",
    }
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    same_end(calm, ended)
    assert checkpoints(ended) == [8, 12]


def test_other_format(refused, lives, ended, calm):
    """If only the newest has another format, older ones are not used; if all do, the start is
    refused unless started over on request."""
    another_format(ended.checkpoints / "update-00000012")
    for flags in ((), (AFRESH,)):  # one can be read, so the flag changes nothing
        one = refused(*flags)
        seen("other format", one.code, one.err)
    another_format(ended.checkpoints / "update-00000008")
    one = refused()
    seen("other format", one.code, one.err)
    assert "has 2 checkpoints, but none is readable" in one.err
    assert lives(AFRESH)[0].code == 0
    same_end(calm, ended)


def test_afresh_changes_nothing_where_one_can_be_read(lives, ended, calm):
    """The flag may therefore stay in a job that is requeued."""
    flip(ended.checkpoints / "update-00000012" / "weights" / "model.safetensors")
    one, _ = lives(AFRESH)
    assert f"{AFRESH} changes nothing: update-00000008 is readable" in one.out
    assert "resuming after update 8" in one.out
    assert not list(ended.private.glob("checkpoints.unreadable*"))
    same_end(calm, ended)


def test_afresh_of_a_new_run(lives, run, calm):
    assert lives(AFRESH)[0].code == 0
    same_end(calm, run)


def test_afresh_that_is_killed(refused, lives, ended, calm):
    """Killed after the copy of the metrics, and after the checkpoints were moved."""
    spoil(ended)
    shutil.copy(ended.metrics, ended.checkpoints / "metrics.jsonl")
    refused()
    shelf.start_afresh(ended)
    one = refused()
    assert "records that one was saved at update 12" in one.err
    assert lives(AFRESH)[0].code == 0
    same_end(calm, ended)


@pytest.mark.parametrize("lost", ["folder", "content"])
def test_lost_checkpoints(refused, lives, ended, calm, lost):
    """A folder that was not mounted does not look like a run that never began."""
    shutil.rmtree(ended.checkpoints)
    if lost == "content":
        ended.checkpoints.mkdir()
    one = refused()
    seen("lost checkpoints", one.code, one.err)
    assert lives(AFRESH)[0].code == 0
    same_end(calm, ended)


def test_lost_ticket(refused, ended):
    shutil.rmtree(ended.ticket)
    assert "the ticket of this run is missing" in refused().err
    spoil(ended)
    assert "the ticket of this run is missing" in refused(AFRESH).err


def test_another_ticket(refused, ended):
    """The mistake is found before anything is written."""
    shutil.rmtree(ended.checkpoints / "update-00000012")
    manifest = ended.ticket / "ticket.json"
    manifest.write_text(manifest.read_text().replace('"id": "', '"id": "0'))
    assert "is damaged: its bits do not match its id" in refused().err


def test_lost_settings(refused, ended):
    """Without config.yaml, other settings would pass for the run's."""
    ended.config.unlink()
    one = refused("--train.lr", "0.5")
    assert f"{ended.config} is missing, but " in one.err


def test_damaged_metrics(refused, ended):
    """A damaged record in the middle is refused, because those after it would be lost."""
    lines = ended.metrics.read_text().splitlines(keepends=True)
    lines[3] = lines[3][:-5] + "\n"
    ended.metrics.write_text("".join(lines))
    assert f"{ended.metrics}, line 4 is damaged" in refused().err


def test_code_in_settings(lives, ended):
    """The code that began the run stays; the code that started it last is updated."""
    now, old = str(code_version()), "pmp-ds 0.0.9 (commit abc)"
    text = ended.config.read_text()
    assert text.startswith(f"# begun with {now}\n# last started with {now}\nrun:\n")
    for before, begun in (
        (text.replace(now, old), old),
        (text[text.index("run:\n") :], "unknown"),  # of an older version
    ):
        ended.config.write_text(before)
        assert lives()[0].code == 0
        lines = ended.config.read_text().splitlines()
        assert lines[:3] == [f"# begun with {begun}", f"# last started with {now}", "run:"]


def test_lost_key(refused, lives, run):
    assert lives(*SECRET)[0].code == 0
    key = (run.init / "key").read_bytes()
    (run.init / "key").unlink()
    one = refused(*SECRET)
    seen("lost key", one.code, one.err)
    before = files_of(run.root)
    with pytest.raises(UserError) as caught:
        summarize(run, "a prompt")  # launcher/report.py
    seen("lost key, report", 1, f"error: {caught.value}")
    assert files_of(run.root) == before
    digest = (run.init / "theta0.json").read_bytes()
    (run.init / "theta0.json").unlink()
    assert f"but {run.ticket} was made with it" in refused(*SECRET).err
    (run.init / "theta0.json").write_bytes(digest)
    (run.init / "key").write_bytes(key[:-1] + bytes([key[-1] ^ 1]))
    one = refused(*SECRET)
    seen("key", one.code, one.err)


def key_of(root: str) -> bytes:
    """Return the key as read by a rank whose host has a folder of its own."""
    return bytes(theta0.init_of(RunDir(Path(root) / str(dist.rank())), Config()))


def test_the_key_does_not_travel_between_ranks(ranks2, tmp_path):
    """Each rank reads the key itself: others may listen to the network between hosts."""
    for rank in (0, 1):
        folder = RunDir(tmp_path / str(rank)).init
        folder.mkdir(parents=True)
        (folder / "key").write_bytes(bytes([rank]) * 32)
        (folder / "key").chmod(0o600)
    assert ranks2.run(key_of, str(tmp_path)) == [bytes([rank]) * 32 for rank in (0, 1)]


def test_lost_digest(refused, lives, run):
    """The digest is written again if the weights outside the ticket show that the key is the
    run's."""
    assert lives(*SECRET)[0].code == 0
    path = run.init / "theta0.json"
    text, key = path.read_text(), (run.init / "key").read_bytes()
    path.unlink()
    (run.init / "key").write_bytes(key[:-1] + bytes([key[-1] ^ 1]))
    assert "weights outside the ticket that differ from those of" in refused(*SECRET).err
    (run.init / "key").write_bytes(key)
    assert lives(*SECRET)[0].code == 0
    assert path.read_text() == text


def test_digest_of_an_older_version(lives, run):
    """An older digest is of all bytes in one sequence, and may lack a check value of the key or a
    seal: both are added after theta(0) was drawn and compared."""
    assert lives(*SECRET)[0].code == 0
    path = run.init / "theta0.json"
    values = json.loads(path.read_text())
    assert sorted(values) == [
        "digest",
        "format_version",
        "key_check",
        "seal",
        "sha256",
        "source",
    ]
    assert values["digest"] == "chunks"
    first = {"sha256": weights_digest(tiny.at_theta0(run))}
    assert first["sha256"] != values["sha256"]
    for older in (first, {"format_version": 2, "key_check": values["key_check"]} | first):
        path.write_text(json.dumps(older))
        assert lives(*SECRET)[0].code == 0
        after = json.loads(path.read_text())
        assert after == values | first | {"digest": None, "seal": after["seal"]}
        assert after["seal"] != values["seal"]
        assert theta0.proven_lineage(run) == first["sha256"]
    path.write_text(json.dumps({"sha256": "0" * 64}))
    one, _ = lives(*SECRET)
    assert "theta(0) drawn again differs" in one.err


@contextlib.contextmanager
def cut_once_named(step: int, name: str) -> Iterator[None]:
    """Truncate a file of a checkpoint when the folder gets its name."""
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        original(source, target)
        if Path(target).name == f"update-{step:08d}":
            os.truncate(Path(target) / name, (Path(target) / name).stat().st_size - 3)

    with mock.patch.object(os, "replace", replace):
        yield


@pytest.mark.parametrize(
    ("name", "background"),
    daily(
        product(
            ["weights/model.safetensors", "state/rank-00001.safetensors", "manifest.json"],
            ["true", "false"],
        ),
        [("weights/model.safetensors", "true"), ("state/rank-00001.safetensors", "true")],
    ),
)
def test_save_that_does_not_read_back(lives, run, calm, name, background):
    """A save that fails to read back is not a checkpoint: the previous one is kept, and the next
    start does not count it."""
    flags = ("--run.keep_last", "1", "--run.async_save", background)
    one, other = lives(*flags, fault=cut_once_named, given=(8, name))
    seen("not read back", one.code, one.err)
    assert (other.code, checkpoints(run)) == (0, [12])
    assert not (run.checkpoints / "update-00000008.damaged").exists()  # a newer one was kept
    same_end(calm, run)


def test_last_save_that_does_not_read_back(lives, run, calm):
    given = (12, "weights/model.safetensors")
    one, other = lives("--run.keep_last", "1", fault=cut_once_named, given=given)
    assert (one.code, other.code, checkpoints(run)) == (1, 1, [8])
    assert (run.checkpoints / "latest").read_text() == "update-00000008\n"
    assert (run.checkpoints / "update-00000012.damaged").is_dir()
    assert lives()[0].code == 0
    same_end(calm, run)
