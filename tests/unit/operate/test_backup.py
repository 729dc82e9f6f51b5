"""A backup's archive and its restore: what is written, refused, and left as it was."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pmp_ds import lease
from pmp_ds.errors import UserError
from pmp_ds.operate.backup_file import MANIFEST, Backup, archived, read_archive
from pmp_ds.operate.restore import missing, write
from pmp_ds.run_dir import RunDir, loose
from pmp_ds.state.manifest import Position, write_manifest
from pmp_ds.ticket.archive import pack, unpack
from pmp_ds.ticket.keys import encrypt, new_identity, public_keys
from tests.helpers.commands import call, error_of, files_of, ok

FILES = {
    "private/init/key": b"k" * 32,
    "private/ticket/mask.safetensors": b"bits",
    "private/ticket/ticket.json": b'{"id": "t1"}',
    "private/vault/sealed.jsonl": b'{"a": 1}\n',
    "private/ledger.jsonl": b'{"b": 1}\n',
    "tokenizer/tokenizer.json": b"{}",
    "data.json": b'{"dataset_id": "d1"}',
    "config.yaml": b"# begun\nrun: {name: x}\ntrain: {lr: 1.0}\n",
}
WHERE = Path("x.age")


def backup(files: dict[str, bytes] = FILES) -> Backup:
    return read_archive(archived("x", files), WHERE)


def altered(**changes: bytes | None) -> bytes:
    """Return an archive with some files exchanged, added or (None) left out after its digests were
    written; `__` stands for a slash, `_1` for a dot."""
    inside = unpack(archived("x", FILES), lambda name: name, WHERE, "")
    for name, content in changes.items():
        path = name.replace("__", "/").replace("_1", ".")
        inside.pop(path, None)
        if content is not None:
            inside[path] = content
    return pack(inside)


def test_into_an_empty_folder(tmp_path: Path):
    run, given = RunDir(tmp_path / "x"), backup()
    assert (given.run, list(given.files)) == ("x", list(FILES))
    names = missing(given, run)
    assert names == list(FILES)
    assert not run.root.exists()
    write(given, run, names)
    there = {str(p.relative_to(run.root)): p.read_bytes() for p in run.root.rglob("*.*")}
    assert there | {"private/init/key": (run.init / "key").read_bytes()} == FILES
    assert loose(run.private) == []
    assert missing(given, run) == []


def test_any_tar_opens_it(tmp_path: Path):
    with tarfile.open(fileobj=io.BytesIO(archived("x", FILES))) as tar:
        tar.extractall(tmp_path, filter="tar")
    assert (tmp_path / "private/init/key").read_bytes() == FILES["private/init/key"]
    assert loose(tmp_path / "private") == []


def test_it_goes_on_after_an_interruption(tmp_path: Path):
    run, given = RunDir(tmp_path), backup()
    part = dict(list(FILES.items())[:4])
    write(replace(given, files=part), run, list(part))
    (run.init / "key").chmod(0o644)
    names = missing(given, run)
    assert names == list(FILES)[4:]
    write(given, run, names)
    assert loose(run.private) == []


def test_nothing_is_overwritten(tmp_path: Path):
    run, given = RunDir(tmp_path / "x"), backup()
    write(given, run, list(FILES))
    (run.init / "key").write_bytes(b"o" * 32)
    run.data.write_text("{}")
    (run.ticket / "ticket.json").unlink()
    before = files_of(run.root)
    with pytest.raises(UserError) as caught:
        missing(given, run)
    assert f"{run.root} has other files than the backup of x of 2" in str(caught.value)
    assert ": private/init/key, data.json. Nothing was changed" in str(caught.value)
    assert files_of(run.root) == before


def test_a_longer_ledger_stays_and_a_shorter_one_is_refused(tmp_path: Path):
    run, given = RunDir(tmp_path / "x"), backup()
    write(given, run, list(FILES))
    with open(run.ledger, "ab") as file:
        file.write(b'{"b": 2}\n')
    assert missing(given, run) == []
    run.ledger.write_bytes(b"")
    with pytest.raises(UserError, match=r"private/ledger\.jsonl\. Nothing"):
        missing(given, run)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("# begun\n# started later\nrun: {name: x, keep_last: 9}\ntrain: {lr: 1.0}\n", False),
        ("run: {name: x}\ntrain: {lr: 2.0}\n", True),
        ("run: {name: [", True),
    ],
)
def test_settings_may_differ_as_when_a_run_resumes(tmp_path: Path, text: str, refused: bool):
    run, given = RunDir(tmp_path / "x"), backup()
    write(given, run, list(FILES))
    run.config.write_text(text)
    if refused:
        with pytest.raises(UserError, match=r": config\.yaml\. Nothing"):
            missing(given, run)
    else:
        assert missing(given, run) == []


@pytest.mark.parametrize(("ticket", "data", "what"), [("t2", "d1", "ticket"), ("t1", "d2", "data")])
def test_checkpoints_of_another_run(tmp_path: Path, ticket: str, data: str, what: str):
    run = RunDir(tmp_path / "x")
    run.create()
    position = Position(
        step=5, consumed_samples=0, ticket_id=ticket, dataset_id=data, val_loss=None
    )
    (run.checkpoints / position.name).mkdir()
    write_manifest(run.checkpoints / position.name, position, {})
    with pytest.raises(UserError, match=f"was trained with another {what} than that of the backup"):
        missing(backup(), run)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"no tar", "opens with this key, but is not a backup of a run"),
        (pack({"ticket/ticket.json": b"{}"}), "opens with this key, but is not a backup of a run"),
        (altered(private__init__key=b"q" * 32), "private/init/key does not match its digest"),
        (altered(private__init__key=None), "it lacks 'private/init/key'"),
        (altered(tokenizer__more=b""), "it has the unlisted file 'tokenizer/more'"),
        (altered(backup_1json=b"{}"), "format_version is not a number"),
        (altered(backup_1json=b'{"format_version": 2}'), "has format 2, which a later version"),
        (
            altered(backup_1json=b'{"format_version": 1}'),
            "x.age: backup.json is damaged: it is None",
        ),
        (altered(backup_1json=b"\xff"), "it is not UTF-8"),
    ],
)
def test_another_archive(archive: bytes, message: str):
    with pytest.raises(UserError) as caught:
        read_archive(archive, WHERE)
    assert message in str(caught.value)
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "private/checkpoints/x", "private/init/.x", "tokenizer/../x"]
)
def test_no_other_file_is_written(name: str):
    """A stranger who knows the public key can seal any archive."""
    with pytest.raises(UserError, match="a backup has no file of this name"):
        archived("x", {name: b""})
    manifest = {"format_version": 1, "run": "x", "date": "", "files": {name: ""}}
    with pytest.raises(UserError, match="it lacks"):
        read_archive(pack({MANIFEST: json.dumps(manifest).encode(), name: b""}), WHERE)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Return a folder with x.age and the key that opens it."""
    public = new_identity(tmp_path / "key.txt")
    new_identity(tmp_path / "other.txt")
    content = encrypt(archived("x", FILES), public_keys([public]))
    (tmp_path / "x.age").write_bytes(content)
    (tmp_path / "torn.age").write_bytes(content[:-1])
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.age"], "what opens x.age? Give --identity KEY, or a passphrase"),
        (["x.age", "--identity", "other.txt"], "x.age does not open with this key"),
        (["torn.age", "--identity", "key.txt"], "torn.age is damaged or cut off"),
        (["none.age", "--identity", "key.txt"], "none.age is missing"),
    ],
)
def test_mistakes_of_a_restore(sealed: Path, words: list[str], message: str):
    assert message in error_of(call("restore.py", *words, "--run", "new", cwd=sealed))
    assert not (sealed / "new").exists()


def test_a_folder_in_use(sealed: Path):
    words = ["x.age", "--identity", "key.txt", "--run", "new"]
    with lease.hold(sealed / "new", "it"):
        assert "is in use by" in error_of(call("restore.py", *words, cwd=sealed))
    assert not (sealed / "new").exists()
    done = ok(call("restore.py", *words, cwd=sealed))
    assert done.stdout.startswith("new: 8 of 8 files written, the others were there\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--out", "b.age"], "give --to KEY, or a passphrase, and not both"),
        (["none", "--to", "age1", "--out", "b.age"], "none is not a run's folder"),
        (["run", "--to", "age1", "--out", "key.txt"], "--out key.txt already exists"),
        (["run", "--to", "age1", "--out", "no/b.age"], "the folder no does not exist"),
        (["run", "--to", "key.txt", "--out", "b.age"], "this is a secret key; pass"),
        (["run", "--to", "age1", "--out", "run/release/b.age"], "which leaves"),
    ],
)
def test_mistakes_of_a_backup(sealed: Path, words: list[str], message: str):
    (sealed / "run/release").mkdir(parents=True)
    assert message in error_of(call("backup.py", *words, cwd=sealed))
    assert not (sealed / "b.age").exists()
