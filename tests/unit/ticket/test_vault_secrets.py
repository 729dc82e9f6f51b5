"""Secrets given in place of their files are never repeated, and a full disk is named."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from pmp_ds import commands
from pmp_ds.commands import evaluate, finetune, restore, vault
from pmp_ds.commands.vault import main
from pmp_ds.errors import UserError
from pmp_ds.ticket.keys import identities, read_passphrase
from tests.unit.ticket.test_vault import make_key


def test_a_secret_key_in_place_of_its_file_is_not_repeated(run, tmp_path, capsys):
    """On the command line of every command, misplaced too, and in a YAML file."""
    secret, sealed = str(pyrage.x25519.Identity.generate()), str(tmp_path / "a.age")
    pem = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaA\n-----END OPENSSH PRIVATE KEY-----"
    settings = tmp_path / "x.yaml"
    settings.write_text(f"model: m\nmethod: ticket\nticket: t\nidentity: {secret}\n")
    for command, *argv in (
        (vault.command, "show", sealed, "--identity", secret),
        (vault.command, "show", sealed, f"--identity={secret.lower()}"),
        (vault.command, "open", sealed, "--out", "x", "--identity", pem),
        (vault.command, "show", secret),
        (vault.command, secret),
        (commands.main, secret),
        (vault.command, "seal", "--run", str(run.root), "--name", "A", "--to", "age1x", secret),
        (restore.command, sealed, "--identity", secret, "--run", "x"),
        (restore.command, sealed, "--identty", secret, "--run", "x"),
        (evaluate.command, "--ticket", sealed, "--identity", secret),
        (finetune.command, "--config", str(settings)),
    ):
        assert command(argv) == 1
        err = capsys.readouterr().err
        assert " was given a secret key itself, which is not repeated here: give the name" in err
        assert err.count("\n") == 1
    for key in (secret, pem):
        with pytest.raises(UserError, match="--identity was given a secret key itself") as caught:
            identities(Path(key))
        assert key not in str(caught.value)


def test_a_passphrase_in_place_of_its_file_is_not_repeated(tmp_path):
    for word in ("open sesame", "sesame" * 50):
        with pytest.raises(UserError, match="--passphrase-file names no file") as caught:
            read_passphrase(Path(word), confirm=False)
        assert "sesame" not in str(caught.value)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process become longer than ``size``."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named(run, tmp_path):
    key, public = make_key(tmp_path)
    sealed, out = tmp_path / "a.age", tmp_path / "opened"
    words = ["seal", "--run", str(run.root), "--name", "A", "--to", public, "--out", str(sealed)]
    with full_disk(0), pytest.raises(UserError, match=r"vault/sealed.jsonl: File too large"):
        main(words)
    with full_disk(600), pytest.raises(UserError, match=r"a.age: File too large"):
        main(words)
    main(words)
    opening = ["open", str(sealed), "--identity", str(key), "--out", str(out)]
    with full_disk(10), pytest.raises(UserError, match=r"opened: File too large"):
        main(opening)
