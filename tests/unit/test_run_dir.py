import errno
import json
import os
import stat
from pathlib import Path

import pytest

from pmp_ds import run_dir
from pmp_ds.run_dir import RunDir, atomic_path, make_private, write_json, write_text


@pytest.fixture(params=[0o000, 0o022, 0o077], ids="umask {:o}".format, autouse=True)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_names():
    run = RunDir(Path("runs/x"))
    outside = [
        run.config,
        run.data,
        run.tokenizer,
        run.metrics,
        run.tensorboard,
        run.plots,
        run.release,
    ]
    secret = [run.ticket, run.init, run.checkpoints]
    assert all(run.private not in (path, *path.parents) for path in outside)
    assert all(run.private in path.parents for path in secret)
    assert len({*outside, *secret, run.private}) == 11


def test_create_closes_the_private_folders(tmp_path):
    run = RunDir(tmp_path / "deep" / "x")
    run.create()
    for folder in (run.private, run.ticket, run.init, run.checkpoints):
        assert mode(folder) == 0o700
    run.private.chmod(0o755)
    (run.ticket / "file").touch()
    run.create()
    assert mode(run.private) == 0o700
    assert (run.ticket / "file").exists(), "creating again emptied a folder"


def test_new_private_folder_is_never_open(tmp_path, monkeypatch):
    """Not even between its creation and a chmod."""
    monkeypatch.delattr(Path, "chmod")
    make_private(tmp_path / "f")
    assert mode(tmp_path / "f") == 0o700


def test_make_private_leaves_a_stricter_folder_alone(tmp_path):
    (tmp_path / "f").mkdir(mode=0o500)
    make_private(tmp_path / "f")
    assert mode(tmp_path / "f") == 0o500


def test_private_file_is_closed_from_its_first_byte(tmp_path):
    path = tmp_path / "secret"
    with atomic_path(path, private=True) as temporary:
        assert mode(temporary) == 0o600
        assert temporary.parent == tmp_path, "a rename would cross file systems"
        temporary.write_text("x")
        assert not path.exists()
    assert mode(path) == 0o600
    assert path.read_text() == "x"


def test_private_file_whose_writer_replaced_it(tmp_path):
    """safetensors unlinks and creates its own file, open to all."""
    path = tmp_path / "secret"
    with atomic_path(path, private=True) as temporary:
        temporary.unlink()
        temporary.write_text("x")
        temporary.chmod(0o644)
    assert mode(path) == 0o600


def test_public_file_obeys_the_umask(tmp_path):
    write_text(tmp_path / "public", "x")
    current = os.umask(0)
    os.umask(current)
    assert mode(tmp_path / "public") == 0o644 & ~current


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_replaces(tmp_path):
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "gr\u00fc\u00df\n")
    assert (tmp_path / "file").read_bytes() == "gr\u00fc\u00df\n".encode()
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_values_are_equal_files(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": [2, None]})
    write_json(tmp_path / "b", {"y": [2, None], "x": 1}, private=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "y": [2, None]}
    assert mode(tmp_path / "b") == 0o600


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_dir.fcntl, "flock", no_locks)
    with open(tmp_path / "x", "wb") as file:
        run_dir.lock(file)
