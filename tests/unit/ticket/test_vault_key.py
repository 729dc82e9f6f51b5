"""Lost parts of a vault are never silently recreated: the key of its watermarks, its registry."""

import json
from pathlib import Path

import pytest

from pmp_ds.cli import dump
from pmp_ds.commands.vault import main
from pmp_ds.config import Config, InitConfig
from pmp_ds.errors import UserError
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import write_text
from pmp_ds.ticket.vault import records
from tests.helpers.commands import files_of
from tests.unit.ticket.test_vault import seal_for


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_the_key_of_watermarks_is_never_made_anew(run, tmp_path, damage, public):
    """Copies marked with another key could not be traced, and nothing would show it."""
    if public:
        write_text(run.config, dump(Config(init=InitConfig(seed=42))))
    sealed, key = seal_for(run, "Partner A", tmp_path)
    main(["open", str(sealed), "--identity", str(key), "--out", str(tmp_path / "leak")])
    path = (run.vault if public else run.init) / "key"
    damage(path)
    before = files_of(run.root)
    root = str(run.root)
    message = "key is missing" if damage is Path.unlink else "key is damaged or another run's"
    with pytest.raises(UserError, match=message):
        seal_for(run, "Partner B", tmp_path)
    with pytest.raises(UserError, match=message):
        main(["trace", "--run", root, "--ticket", str(tmp_path / "leak")])
    assert files_of(run.root) == before
    assert not (tmp_path / "B.age").exists()


def test_a_vault_without_its_registry(run, tmp_path):
    """The recipients of sealed copies are not silently lost."""
    seal_for(run, "Partner A", tmp_path)
    (run.vault / "sealed.jsonl").unlink()
    with pytest.raises(UserError, match=r"sealed\.jsonl is missing: restore it from a backup"):
        seal_for(run, "Partner B", tmp_path)
    with pytest.raises(UserError, match=r"sealed\.jsonl is missing"):
        main(["list", "--run", str(run.root)])
    assert list(run.vault.iterdir()) == []


def test_a_refused_seal_leaves_a_public_run_as_good_as_new(run, tmp_path):
    """A mistake may happen between the vault's new key and its first copy."""
    write_text(run.config, dump(Config(init=InitConfig(seed=42))))
    (run.init / "key").unlink()
    wrong = tmp_path / "empty"
    wrong.write_text("")
    with pytest.raises(UserError):
        main(
            [
                "seal",
                "--run",
                str(run.root),
                "--name",
                "A",
                "--out",
                str(tmp_path / "a.age"),
                "--passphrase-file",
                str(wrong),
            ]
        )
    seal_for(run, "A", tmp_path)
    assert len(records(run.vault)) == 1


def test_registry_of_an_older_version(run, tmp_path, capsys):
    """Its lines have no number; one of a later version is not taken for damage."""
    seal_for(run, "Partner A", tmp_path)
    path = run.vault / "sealed.jsonl"
    line = json.loads(path.read_text())
    assert line.pop("format_version") == 3
    path.write_text(json.dumps(line))  # without its newline too, as an editor may leave it
    seal_for(run, "Partner B", tmp_path)
    assert [record.name for record in records(run.vault)] == ["Partner A", "Partner B"]
    main(["trace", "--run", str(run.root), "--ticket", str(run.ticket)])
    said = capsys.readouterr().out
    assert "the copies for Partner A were marked by a development version of pmp-ds 0.1.0" in said
    assert "Partner B: agrees in" in said
    path.write_text(json.dumps(line | {"format_version": 4, "more": 1}) + "\n")
    with pytest.raises(FormatError, match=r"line 1, has format 4, which a later version"):
        records(run.vault)
