"""Stored checkpoints: which one is found, the messages about unreadable ones, and which are
deleted or kept."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmp_ds.errors import UserError
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import RunDir, sweep
from pmp_ds.state import checkpoint, shelf
from pmp_ds.state.shelf import UnreadableError
from pmp_ds.version import code_version
from tests.distributed.test_checkpoint import BATCH, POSITION, segment
from tests.helpers.commands import files_of

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(written, tmp_path) -> RunDir:
    """Return a copy of ``written`` to damage."""
    return RunDir(Path(shutil.copytree(written, tmp_path / "run")))


def newest(run: RunDir) -> Path:
    return run.checkpoints / "update-00000003"


def test_newest_is_found(run):
    folder, position = shelf.find(run) or pytest.fail("nothing found")
    assert folder == newest(run)
    assert (position.step, position.consumed_samples) == (3, 3 * BATCH)
    assert (position.ticket_id, position.dataset_id) == (POSITION.ticket_id, POSITION.dataset_id)


def test_found_by_update(run):
    folder, position = shelf.find(run, 2) or pytest.fail("nothing found")
    assert (folder.name, position.step) == ("update-00000002", 2)


def test_update_that_does_not_exist(run):
    with pytest.raises(UserError, match=r"no checkpoint of update 7; it has: 3, 2, 1"):
        shelf.find(run, 7)


def test_run_without_checkpoints(tmp_path):
    run = RunDir(tmp_path / "new")
    run.create()
    assert shelf.find(run) is None
    with pytest.raises(UserError, match="it has: none"):
        shelf.find(run, 7)


def flip(file: str, offset: int = -1) -> Callable[[Path], None]:
    """Flip the highest bit of one byte."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[offset] ^= 0x80
        (folder / file).write_bytes(data)

    return damage


def cut(file: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - 1)


def rewrite(file: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_text(text)

    return damage


def edit(**changes: Any) -> Callable[[Path], None]:
    """Replace entries of the manifest; None removes one."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        kept = {name: value for name, value in manifest.items() if value is not None}
        (folder / "manifest.json").write_text(json.dumps(kept))

    return damage


def swap(other: str) -> Callable[[Path], None]:
    """Replace the content by another checkpoint's."""

    def damage(folder: Path) -> None:
        shutil.copytree(folder.with_name(other), folder, dirs_exist_ok=True)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (flip("weights/model.safetensors"), "weights/model.safetensors"),
    "config": (flip("weights/config.json", 40), "weights/config.json"),
    "state": (flip("state/rank-00001.safetensors"), "state/rank-00001.safetensors"),
    "state cut": (cut("state/rank-00000.safetensors"), "state/rank-00000.safetensors"),
    "state missing": (
        lambda folder: (folder / "state/rank-00001.safetensors").unlink(),
        "state/rank-00001.safetensors",
    ),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 30), "manifest.json"),
    "manifest empty": (lambda folder: os.truncate(folder / "manifest.json", 0), "manifest.json"),
    "manifest not text": (flip("manifest.json", 12), "manifest.json"),
    "manifest a list": (rewrite("manifest.json", "[]"), "manifest.json"),
    "position missing": (edit(step=None), "manifest.json"),
    "files missing": (edit(files=None), "manifest.json"),
    "files a list": (edit(files=["a"]), "manifest.json"),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "format no number": (edit(format_version="x"), "manifest.json"),
    "position flipped": (edit(consumed_samples=4), "manifest.json"),
    "under another name": (swap("update-00000002"), "it contains update-00000002"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_one_is_named_and_passed_over(run, capsys, damage, named):
    damage(newest(run))
    folder, position = shelf.find(run) or pytest.fail("nothing found")
    assert (folder.name, position.step) == ("update-00000002", 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: checkpoint {newest(run)} ")
    assert named in line


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_one_that_was_asked_for(run, damage, named):
    damage(newest(run))
    with pytest.raises(UserError, match=named):
        shelf.find(run, 3)
    assert shelf.find(run, 2) is not None


def test_all_damaged(run, capsys):
    """All damaged differs from none: that would be a start at update 0."""
    folders = [run.checkpoints / f"update-0000000{step}" for step in (3, 2, 1)]
    flip("weights/model.safetensors")(folders[0])
    cut("state/rank-00001.safetensors")(folders[1])
    (folders[2] / "manifest.json").unlink()
    before = files_of(run.root)
    with pytest.raises(UnreadableError) as caught:
        shelf.find(run)
    head, *lines, way_out = str(caught.value).splitlines()
    assert head.startswith(f"{run.checkpoints} has 3 checkpoints, but none is readable;")
    names = (
        "weights/model.safetensors",
        "state/rank-00001.safetensors",
        "manifest.json is missing",
    )
    assert lines == [
        f"  checkpoint {folder} is damaged: {name}"
        for folder, name in zip(folders, names, strict=True)
    ]
    assert way_out.startswith("  restore one from a backup, or train with --start-afresh")
    assert capsys.readouterr().out == ""
    assert files_of(run.root) == before


@pytest.mark.parametrize("step", [3, 2])
def test_another_format_is_never_passed_over(run, step):
    """Another format is not damage, so an older checkpoint is not used instead."""
    other = run.checkpoints / f"update-0000000{step}"
    edit(format_version=1)(other)
    if step == 2:  # a damaged newer one does not matter
        flip("weights/config.json", 40)(newest(run))
    with pytest.raises(FormatError) as caught:
        shelf.find(run)
    assert str(caught.value).startswith(
        f"checkpoint {other} has format 1, which a development version of pmp-ds 0.1.0 before"
    )
    assert f"this is {code_version()}, which reads formats 2, 3, 4 and 5: " in str(caught.value)
    with pytest.raises(FormatError, match="has format 1"):
        shelf.find(run, step)
    shelf.prune(run, "train", 1)
    assert other.is_dir()


def test_another_format_of_an_older_one_is_no_matter(run):
    edit(format_version=1)(run.checkpoints / "update-00000001")
    assert (shelf.find(run) or pytest.fail("nothing found"))[1].step == 3


def test_format_2_is_read(run, capsys):
    """Format 2 is read as it was before the manifest named the code."""
    path = newest(run) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("code") == str(code_version())
    manifest["format_version"] = 2
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))
    assert (shelf.find(run) or pytest.fail("nothing found"))[1].step == 3
    assert capsys.readouterr().out == ""


def test_folder_that_cannot_be_listed(run):
    """An unreadable folder is not an empty one."""
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("a mount that went wrong")
    with pytest.raises(UserError, match=r"checkpoints cannot be read: Not a directory"):
        shelf.find(run)


def test_unfinished_ones_do_not_count(run):
    newest(run).rename(newest(run).with_name("update-00000003.incomplete"))
    shutil.copytree(run.checkpoints / "update-00000001", run.checkpoints / "update-00000009")
    (run.checkpoints / "update-00000009").rename(run.checkpoints / "update-00000009.damaged")
    found = shelf.find(run)
    assert found is not None
    assert found[1].step == 2


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_prune_keeps_the_newest(run, keep, left):
    shelf.prune(run, "train", keep)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["latest", *(f"update-{step:08d}" for step in left)]


def test_what_cannot_be_deleted_is_left_for_later(run, monkeypatch, capsys):
    """As on NFS, where a file that another process has open is renamed and keeps its folder."""

    def refuse(path: Any, **_: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        shelf.prune(run, "train", 2)
        assert "update-00000001.incomplete cannot be deleted yet" in capsys.readouterr().err
        sweep(run)
    sweep(run)
    assert left(run) == [2, 3]
    assert not [*run.checkpoints.glob("*.incomplete")]


def test_prune_counts_what_can_be_read(run):
    """Unreadable checkpoints neither count nor are deleted, and the one just written stays,
    whatever the names of the others."""
    for step in (8, 9):
        shutil.copytree(newest(run), run.checkpoints / f"update-0000000{step}")
    shelf.prune(run, "train", 2, written="update-00000001")
    assert left(run) == [1, 2, 3, 8, 9]
    shelf.prune(run, "train", 1, written="update-00000001")
    assert left(run) == [1, 3, 8, 9]
    shelf.prune(run, "train", 1)
    assert left(run) == [3, 8, 9]
    assert (run.checkpoints / "latest").read_text() == "update-00000009\n"


def left(run: RunDir) -> list[int]:
    return sorted(int(p.name[-8:]) for p in run.checkpoints.glob("update-????????"))


def test_damaged_ones_go_when_enough_newer_ones_can_be_read(run):
    names = {shelf.set_aside(run.checkpoints / "update-00000002").name}
    shutil.copytree(newest(run), run.checkpoints / "update-00000002")
    names.add(shelf.set_aside(run.checkpoints / "update-00000002").name)
    assert names == {"update-00000002.damaged", "update-00000002.damaged-2"}
    shelf.prune(run, "train", 2)
    assert names <= {path.name for path in run.checkpoints.iterdir()}
    shelf.prune(run, "train", 1)
    assert {path.name for path in run.checkpoints.iterdir()} == {"update-00000003", "latest"}


@pytest.mark.parametrize("intact", [True, False])
def test_save_over_one_of_the_same_name(ranks2, run, written, intact):
    """An intact checkpoint is never given up, not even for a moment; a damaged one is set aside."""
    if not intact:
        flip("weights/model.safetensors")(newest(run))
    before = files_of(newest(run))
    outcome = ranks2.run(saved_again, str(run.root))
    assert len(set(outcome)) == 1
    if intact:
        assert "update-00000003 already exists and is intact: move it elsewhere" in str(outcome[0])
        assert files_of(newest(run)) == before
    else:
        assert outcome[0] is None
        assert (run.checkpoints / "update-00000003.damaged").is_dir()
    assert shelf.survey(run, "train").passed_over == ()
    assert not list(run.root.rglob("*incomplete*"))


def saved_again(root: str) -> str | None:
    """Return the error of a third save of update 3."""
    try:
        segment(root, 2, "bf16", True, resume=False, last=3, save=[3])
    except checkpoint.NotWrittenError as error:
        return str(error)
    return None


def test_goes_on_from_the_one_before_and_replaces_the_damaged_one(ranks2, run, written):
    """The whole story: damage, resume, the same bits again, with a partial folder in the way."""
    flip("state/rank-00000.safetensors")(newest(run))
    shutil.copytree(newest(run), newest(run).with_name("update-00000003.incomplete"))
    ranks2.run(segment, str(run.root), 2, "bf16", True, True, 3, [3])
    assert {path.name for path in run.checkpoints.iterdir()} == {
        "latest",
        "update-00000003.damaged",
        *(f"update-0000000{step}" for step in (1, 2, 3)),
    }
    for path in sorted(newest(run).rglob("*")):
        twin = written / path.relative_to(run.root)
        assert path.is_dir() or path.read_bytes() == twin.read_bytes(), path
