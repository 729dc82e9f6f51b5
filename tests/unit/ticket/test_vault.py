"""Sealed tickets: the keys that open them, errors otherwise, and the registry of recipients."""

import base64
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyrage
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pmp_ds.cli import dump
from pmp_ds.commands.vault import main
from pmp_ds.config import Config, InitConfig
from pmp_ds.errors import UserError
from pmp_ds.run_dir import RunDir, loose, write_text
from pmp_ds.ticket import archive
from pmp_ds.ticket.keys import (
    Passphrase,
    decrypt,
    encrypt,
    identities,
    new_identity,
    public_keys,
    read_passphrase,
)
from pmp_ds.ticket.ticket import load_ticket, save_ticket, to_files
from pmp_ds.ticket.vault import Record, open_sealed, records, remember, seal
from pmp_ds.ticket.watermark import FEWEST
from tests.helpers import age_reference
from tests.unit.ticket.test_watermark import ticket

# Written by the `age` command 1.1.1: `age -a -r age1...` and `age -a -p`.
AGE_TEXT = b"made by age 1.1.1"
AGE_KEY = "AGE-SECRET-KEY-14RFYPJ2ZWYSC3H8Q308WV64DV6EEEFQAM7377JTCA547EFA66DQSH8GCQW"
AGE_BY_KEY = b"""-----BEGIN AGE ENCRYPTED FILE-----
YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSA5MVNhZUh3ak5TUXY2THpQ
azBjM1lJV3hNcmZXN1N1bWRBVkUyditrZjFjCmZTb1pGaGthQTNiVUtnYW12ajhX
eDBUTnFZZHpsMlRNM0R3Nm9VaGlqQ2sKLS0tIG5mYkJyeEpYcUlTSEpYY3VUZzdL
N1FXZEsvcjFkeFlaZ0dBRjZQNHRvREEKWwV86zqlcLHs6Cugnj76qQykJ5dPMFMY
VbnnXv5ipFZnWqZtPCy/niSilZg76S0fvw==
-----END AGE ENCRYPTED FILE-----
"""
AGE_BY_PASSPHRASE = b"""-----BEGIN AGE ENCRYPTED FILE-----
YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCBTTlUwSWFGTzBqWi9ZZGtO
Smk0VitBIDE4Cm1EeUNVRjZpVWtLZWI3VXdjQzlORlpvZnc4Y2Rma0NIbEtJVzhC
ME9jZm8KLS0tIDBjYzlCQVpIbC9EeEl6cDAyemhqM2k1cFhOWC9kNklVMnZMbGQw
YlcxeUUK5zpGwhfGEIAFRmY2LFQhl2x7PwcWLgDX66EYV9BpCoicdoxqZe8A8WWz
aRTuOemDpA==
-----END AGE ENCRYPTED FILE-----
"""


def make_key(folder: Path, name: str = "key.txt") -> tuple[Path, str]:
    """Return a secret key's file and its public key."""
    return folder / name, new_identity(folder / name)


def sealed_file(folder: Path, public: str) -> Path:
    file = folder / "a.age"
    file.write_bytes(seal(ticket(), public_keys([public])))
    return file


def same(one, other) -> bool:
    return replace(one, mask=other.mask) == other and to_files(one) == to_files(other)


def by_reference(sealed: Path, key: Path) -> bytes:
    return age_reference.decrypt(sealed.read_bytes(), key.read_text().splitlines()[-1])


def by_age_command(sealed: Path, key: Path) -> bytes:
    return subprocess.run(
        ["age", "-d", "-i", str(key), str(sealed)], check=True, capture_output=True
    ).stdout


# The command itself joins in where it is installed.
OPENERS = [by_reference, *([by_age_command] if shutil.which("age") else [])]


@pytest.mark.parametrize("opener", OPENERS)
def test_others_open_what_is_sealed_here_with_tar(tmp_path, opener):
    key, public = make_key(tmp_path)
    archive = opener(sealed_file(tmp_path, public), key)
    subprocess.run(["tar", "x"], input=archive, cwd=tmp_path, check=True)
    assert same(load_ticket(tmp_path / "ticket"), ticket())
    assert loose(tmp_path / "ticket") == [], "tar leaves it open to others"


def test_what_others_sealed_opens_here(tmp_path):
    """A ticket's folder, packed by `tar c` and another implementation of age."""
    key, public = make_key(tmp_path)
    save_ticket(ticket(), tmp_path / "given")
    archive = subprocess.run(
        ["tar", "c", "given"], cwd=tmp_path, check=True, capture_output=True
    ).stdout
    (tmp_path / "b.age").write_bytes(age_reference.encrypt(archive, public))
    assert same(open_sealed(tmp_path / "b.age", identities(key)), ticket())


def test_files_of_the_age_command(tmp_path):
    (tmp_path / "key").write_text(AGE_KEY)
    assert decrypt(AGE_BY_KEY, identities(tmp_path / "key"), Path("x")) == AGE_TEXT
    assert decrypt(AGE_BY_PASSPHRASE, Passphrase("correct horse"), Path("x")) == AGE_TEXT


def test_archives_of_files_of_8_gib(tmp_path, monkeypatch):
    """Their headers, and with a lower limit archives whose headers are of both kinds."""
    for size in (0, (1 << 33) - 1, 1 << 33, 1 << 35):
        info = tarfile.TarInfo("ticket/mask.safetensors")
        info.size = size
        header = info.tobuf(archive._format(size))
        assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == size
        with open(tmp_path / "t.tar", "wb") as file:
            file.write(header)
            file.truncate(512 + -(-size // 512) * 512 + 1024)  # holes
        listed = subprocess.run(
            ["tar", "tvf", str(tmp_path / "t.tar")], check=True, capture_output=True, text=True
        ).stdout
        assert str(size) in listed.split()
    files = {"ticket/a": b"small", "ticket/b": b"x" * 1000, "other/c": b""}
    plain = archive.pack(files)
    monkeypatch.setattr(archive, "_LARGE", 1000)
    mixed = archive.pack(files)
    assert mixed != plain
    assert archive.unpack(mixed, lambda name: name, tmp_path, "is not one") == files
    subprocess.run(["tar", "x"], input=mixed, cwd=tmp_path, check=True)
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_equal_tickets_are_equal_archives(tmp_path):
    key, public = make_key(tmp_path)
    both = [decrypt(seal(ticket(), public_keys([public])), identities(key), key) for _ in range(2)]
    assert both[0] == both[1]


SSH_KEYS: dict[str, Any] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
}


def ssh_files(folder: Path, kind: str) -> tuple[Path, Path]:
    key = SSH_KEYS[kind]()
    secret, public = folder / f"id_{kind}", folder / f"id_{kind}.pub"
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(b"# mine\n\n" + line + b" me@home\n")
    return secret, public


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_ssh_keys(tmp_path, kind):
    secret, public = ssh_files(tmp_path, kind)
    keys = public_keys([str(public)])
    assert decrypt(encrypt(b"hello", keys), identities(secret), secret) == b"hello"


def test_an_ssh_key_is_named_as_ssh_keygen_does():
    (key,) = public_keys(
        ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILjHKryTNmOVE2jpINEAulX9eKjhnPCJ5tvfdLMIt0Gv test"]
    )
    assert key.label == "SHA256:k5JUybsx8qu5eNtdwq2e+ZW8uACeumMZl2mpePDZpSQ"


def test_several_keys_open_one_file(tmp_path):
    (one, first), (two, second) = make_key(tmp_path, "1"), make_key(tmp_path, "2")
    (tmp_path / "keys").write_text(f"# ours\n{first}\n")
    sealed = encrypt(b"hello", public_keys([str(tmp_path / "keys"), second]))
    for key in (one, two):
        assert decrypt(sealed, identities(key), key) == b"hello"


def test_wrong_passphrase(tmp_path):
    with pytest.raises(UserError, match="x does not open: the passphrase is wrong"):
        decrypt(AGE_BY_PASSPHRASE, Passphrase("wrong"), Path("x"))
    key, _ = make_key(tmp_path)
    with pytest.raises(UserError, match="for another one, or with a passphrase"):
        decrypt(AGE_BY_PASSPHRASE, identities(key), Path("x"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty is empty"):
        read_passphrase(tmp_path / "empty", confirm=False)


def test_a_file_that_would_keep_the_machine_busy():
    """The sender chooses scrypt's work: 2^30 is refused before it starts."""
    header = b"age-encryption.org/v1\n-> scrypt SNU0IaFO0jZ/YdkNJi4V+A 30\n%b\n--- %b\n"
    sealed = header % (b"A" * 43, b"A" * 43) + bytes(100)
    with pytest.raises(UserError, match="requires more work than a passphrase should"):
        decrypt(sealed, Passphrase("x"), Path("x"))


def flip(at: int):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "cut at its end": (lambda d: d[:-1], "damaged or cut off"),
    "cut in the middle": (lambda d: d[: len(d) // 2], "damaged or cut off"),
    "cut in its header": (lambda d: d[:60], "is not a sealed file"),
    "empty": (lambda d: b"", "is not a sealed file"),
    "longer": (lambda d: d + b"x", "damaged or cut off"),
    "a bit of the content": (flip(-100), "damaged or cut off"),
    "a bit of the first byte": (flip(0), "is not a sealed file"),
    "a letter of the key's line": (
        lambda d: d[:60] + (b"B" if d[60:61] == b"A" else b"A") + d[61:],
        "does not open with this key",
    ),
    "not age": (lambda d: b"PK\3\4" * 50, "is not a sealed file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_says_so_and_no_more(tmp_path, damage, message):
    key, public = make_key(tmp_path)
    file = sealed_file(tmp_path, public)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"a.age .*{message}") as caught:
        open_sealed(file, identities(key))
    assert "embed" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_wrong_key(tmp_path):
    file = sealed_file(tmp_path, make_key(tmp_path)[1])
    with pytest.raises(UserError, match="does not open with this key: it was sealed for another"):
        open_sealed(file, identities(make_key(tmp_path, "other")[0]))
    public = public_keys([make_key(tmp_path, "third")[1]])
    file.write_bytes(encrypt(b"hello", public))
    with pytest.raises(UserError, match="opens with this key, but contains no ticket"):
        open_sealed(file, identities(tmp_path / "third"))
    with pytest.raises(UserError, match="was not sealed with a passphrase"):
        open_sealed(file, Passphrase("x"))


def test_an_archive_with_other_things(tmp_path):
    """Links that lead elsewhere are not followed; anything but a complete ticket is refused."""
    key, public = make_key(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("ticket/ticket.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(key)
        tar.addfile(link)
    (tmp_path / "x.age").write_bytes(encrypt(buffer.getvalue(), public_keys([public])))
    with pytest.raises(UserError, match=r"x\.age is damaged"):
        open_sealed(tmp_path / "x.age", identities(key))


def protected_ssh_key() -> bytes:
    """The file of an ssh key under a passphrase, with nothing in its encrypted part."""
    public = b"ssh-ed25519", bytes(32)

    def string(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    options = string(string(bytes(16)) + (16).to_bytes(4, "big"))
    body = string(b"aes256-ctr", b"bcrypt") + options + (1).to_bytes(4, "big")
    raw = b"openssh-key-v1\0" + body + string(string(*public), bytes(144))
    line = b"-----%b OPENSSH PRIVATE KEY-----\n"
    return line % b"BEGIN" + base64.encodebytes(raw) + line % b"END"


def test_bad_keys(tmp_path):
    key, public = make_key(tmp_path)
    ecdsa, ecdsa_public = ssh_files(tmp_path, "ecdsa")
    locked = tmp_path / "locked"
    locked.write_bytes(protected_ssh_key())
    (tmp_path / "sealed").write_bytes(encrypt(b"x", public_keys([public])))
    (tmp_path / "none").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    secret = key.read_text().splitlines()[-1]
    for given, message in {
        str(tmp_path / "none"): "contains no public key",
        str(tmp_path / "binary"): "binary is not text",
        str(tmp_path / "gone"): "gone is missing",
        str(key): "key.txt, line 3: this is a secret key",
        str(ecdsa_public): "line 3: this is not a usable public key; pass an age",
        public[:-1]: "this is not a usable public key",
        "ssh-rsa": "this is not a usable public key",
        "ssh-ed25519 nonsense": "this is not a usable public key",
        secret: "--to was given a secret key itself",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            public_keys([given])
        assert secret not in str(caught.value)
    for path, message in {
        tmp_path / "none": "contains no usable secret key",
        tmp_path / "gone": "gone is missing",
        ecdsa: "contains no usable secret key",
        locked: "protected by a passphrase",
        tmp_path / "sealed": "is itself sealed",
    }.items():
        with pytest.raises(UserError, match=message):
            identities(path)


def test_new_key(tmp_path):
    before = os.umask(0)
    try:
        path, public = make_key(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(identities(path)[0].to_public()) == public
    with pytest.raises(UserError, match=r"key.txt already exists"):
        new_identity(path)
    with pytest.raises(UserError, match="cannot be written"):
        new_identity(tmp_path / "no" / "key")


def test_registry(tmp_path):
    vault = tmp_path / "vault"
    assert records(vault) == []
    made = [
        Record(name=f"P {n}", keys=("k",) * n, date="d", watermark=None, file="f") for n in (0, 1)
    ]
    for record in made:
        remember(vault, record)
    assert records(vault) == made
    assert loose(vault) == []
    (vault / "sealed.jsonl").write_text('{"name": "x"}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        records(vault)


def test_loose_permissions_are_found(tmp_path):
    save_ticket(ticket(), tmp_path / "t")
    (tmp_path / "t").chmod(0o750)
    (tmp_path / "t" / "ticket.json").chmod(0o604)
    assert [line.split(tmp_path.name)[-1] for line in loose(tmp_path / "t")] == [
        "/t",
        "/t/ticket.json",
    ]
    assert "chmod 600" in loose(tmp_path / "t")[1]


# The launcher, in this process.


def seal_for(run: RunDir, name: str, folder: Path, *more: str) -> tuple[Path, Path]:
    """Return the sealed file and the key that opens it."""
    word = name.rsplit(maxsplit=1)[-1]
    key, public = make_key(folder, f"{word}.key")
    out = folder / f"{word}.age"
    main(["seal", "--run", str(run.root), "--name", name, "--to", public, "--out", str(out), *more])
    return out, key


def test_each_recipient_gets_a_copy_of_their_own(run, tmp_path, capsys):
    opened = {}
    for name in ("Partner A", "Partner B"):
        sealed, key = seal_for(run, name, tmp_path)
        opened[name] = open_sealed(sealed, identities(key))
        lost = ticket().mask.num_kept - opened[name].mask.num_kept
        assert 0.4 * FEWEST < lost < 0.6 * FEWEST
    assert opened["Partner A"].id != opened["Partner B"].id
    # The same recipient gets the same copy again, however the name is spaced.
    again, key = seal_for(run, "Partner  \uff21", tmp_path / "..")
    assert open_sealed(again, identities(key)).id == opened["Partner A"].id
    again.unlink()
    key.unlink()
    plain, key = seal_for(run, "Me", tmp_path, "--no-watermark")
    assert same(open_sealed(plain, identities(key)), ticket())
    sealing = capsys.readouterr().out
    main(["list", "--run", str(run.root)])
    out, err = capsys.readouterr()
    assert "4 copies sealed" in out
    assert "made from the copies of up to 4 recipients together still names one of them" in sealing
    assert out.count("unmarked") == 1
    assert err == ""
    assert loose(run.private) == []


def test_passphrase(run, tmp_path, monkeypatch, capsys):
    """Typed twice to seal, read from a descriptor to open, never shown."""
    out, opened = tmp_path / "a.age", tmp_path / "opened"
    to_seal = ["seal", "--run", str(run.root), "--name", "A", "--out", str(out), "--passphrase"]
    answers = iter(["open sesame", "open sesam", "open sesame", "open sesame"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    with pytest.raises(UserError, match="two passphrases differ"):
        main(to_seal)
    main(to_seal)
    read, write = os.pipe()
    os.write(write, b"open sesame\nnot this\n")
    os.close(write)
    main(["open", str(out), "--passphrase-file", f"/dev/fd/{read}", "--out", str(opened)])
    os.close(read)
    assert load_ticket(opened).mask.num_params == ticket().mask.num_params
    assert loose(opened, out) == []
    shown = "".join(capsys.readouterr()) + (run.vault / "sealed.jsonl").read_text()
    assert "sesame" not in shown + repr(Passphrase("open sesame"))


def test_a_public_run_has_a_watermark_key_of_its_own(run, tmp_path):
    write_text(run.config, dump(Config(init=InitConfig(seed=42))))
    (run.init / "key").unlink()
    seal_for(run, "A", tmp_path)
    assert (run.vault / "key").exists()
    assert not (run.init / "key").exists()


def test_trace_and_verify(run, tmp_path, capsys):
    sealed, key = seal_for(run, "Partner A", tmp_path)
    seal_for(run, "Partner B", tmp_path)
    main(["open", str(sealed), "--identity", str(key), "--out", str(tmp_path / "leak")])
    capsys.readouterr()
    root = str(run.root)
    main(["trace", "--run", root, "--ticket", str(tmp_path / "leak")])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r"Partner A: agrees in 2,048 of 2,048 places, score 1\d{3} "
        r"\(by chance 0, give or take 45\), p <= 10\^-3\d\d",
        lines[0],
    ), lines[0]
    assert lines[-1].startswith("verdict: the copy of Partner A.")
    assert not any("the copy of Partner B" in line for line in lines)
    main(["trace", "--run", root, "--ticket", str(run.ticket)])  # nobody's: the owner's own
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: nobody.")

    main(["verify", str(sealed), "--identity", str(key), "--run", root])
    assert capsys.readouterr().out == f"comes from {root}: its ticket less a watermark\n"
    (tmp_path / "leak" / "mask.safetensors").chmod(0o644)
    key.chmod(0o640)
    main(["verify", str(tmp_path / "leak"), "--identity", str(key), "--run", root])
    warnings = capsys.readouterr().err.splitlines()
    assert [w.split(" is open to others (mode ")[1][:3] for w in warnings] == ["640", "644"]


def test_mistakes_of_the_command_line(run, tmp_path):
    sealed, key = seal_for(run, "Partner A", tmp_path)
    public = str(pyrage.x25519.Identity.from_str(key.read_text().split()[-1]).to_public())
    save_ticket(ticket(shapes={"x": (50, 50)}), tmp_path / "foreign")
    root, out = str(run.root), str(tmp_path / "new")
    to = ["seal", "--run", root, "--name", "B", "--out", out]
    trace = ["trace", "--run", root]
    for argv, message in [
        ([*to], "give --to KEY, or a passphrase"),
        ([*to, "--to", public, "--passphrase"], "not both"),
        ([*to, "--to", public], "was sealed under the name 'Partner A'; use that name"),
        ([*to[:-1], str(sealed), "--to", public], "already exists"),
        ([*to[:-1], str(tmp_path / "no/x"), "--to", public], "folder .*no does not exist"),
        ([*to[:4], " ", *to[5:], "--to", public], "--name is empty"),
        (["seal", "--run", str(tmp_path), *to[3:], "--to", public], "is not a run"),
        (["open", str(sealed), "--out", out], "--identity KEY or --passphrase"),
        (["open", str(tmp_path / "gone"), "--identity", str(key), "--out", out], "gone is missing"),
        (["open", str(sealed), "--identity", str(key), "--out", root], "already exists"),
        (["open", str(sealed), "--identity", str(key), "--out", "/proc/new"], "/proc/new: No such"),
        (["verify", str(sealed)], "verify against what"),
        (["verify", str(sealed), "--run", root], "is a sealed file: pass --identity"),
        (
            ["verify", str(tmp_path / "foreign"), "--run", root],
            "foreign is not a copy of the run's",
        ),
        (["verify", out, "--run", root], "no ticket at .*new"),
        ([*trace], "trace what"),
        ([*trace, "--ticket", "a", "--model", "b"], "trace what"),
        ([*trace, "--ticket", str(tmp_path / "foreign")], "belongs to another model"),
        ([*trace, "--model", out], "is not a folder: name the folder of a model"),
        (["unseal"], r"unknown verb unseal \(did you mean seal\?\)"),
        (["seal", "--out", "x"], "--run, --name are missing"),
    ]:
        with pytest.raises(UserError, match=message):
            main(argv)
    assert not Path(out).exists()
    assert len(records(run.vault)) == 1, "a refused seal was recorded"
    shutil.rmtree(run.vault)
    with pytest.raises(UserError, match="no copy of this ticket was sealed with a watermark"):
        main([*trace, "--ticket", root])


def test_nothing_shows_the_mask(run, tmp_path, capsys):
    sealed, key = seal_for(run, "A", tmp_path)
    main(["open", str(sealed), "--identity", str(key), "--out", str(tmp_path / "t")])
    shown = "".join(capsys.readouterr()) + (run.vault / "sealed.jsonl").read_text()
    opened = load_ticket(tmp_path / "t")
    for secret in (ticket(), opened):
        assert secret.id not in shown
        assert str(secret.mask.num_kept) not in shown.replace(",", "")
    assert torch.equal(opened.mask.full("norm"), torch.ones(40).bool())
