"""Keys that open sealed files: age and ssh keys or a passphrase, through `pyrage`.

    sealed = encrypt(data, public_keys(["partner.pub"]))         data = decrypt(sealed, identities)

The format is that of the `age` command, in both directions. No error shows a key or any content.
"""

import base64
import binascii
import contextlib
import getpass
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrage

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_bytes
from pmp_ds.run_dir import write_text
from pmp_ds.settings import refuse_secret

_KINDS = "age (age1...), ssh-ed25519 or ssh-rsa"
_SECRET = "AGE-SECRET-KEY-"
_MOST_BYTES = 1 << 20  # in a key file
MOST_HEADER = 1 << 16  # in a sealed file: a hundred recipients
_ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"


@dataclass(frozen=True)
class PublicKey:
    """A recipient's public key. ``label`` is an age key itself, or the ``ssh-keygen -l`` line of an
    ssh key."""

    recipient: Any
    label: str


@dataclass(frozen=True)
class Passphrase:
    """A passphrase, which seals and opens like a key; its ``repr`` hides it."""

    text: str

    def __repr__(self) -> str:
        return "Passphrase(...)"


def public_keys(given: Sequence[str]) -> list[PublicKey]:
    """Return the public keys in ``given``: keys, or files with one per line. Raises UserError."""
    keys: list[PublicKey] = []
    for word in given:
        if word.startswith(("age1", "ssh-")):
            keys.append(_public_key(word, "--to"))
        else:
            refuse_secret(word, "--to")
            path = Path(word)
            keys += [_public_key(line, f"{path}, line {n}") for n, line in _lines(path)]
    if not keys:
        raise UserError(f"--to {' '.join(given)} contains no public key")
    return keys


def _public_key(text: str, where: str) -> PublicKey:
    try:
        if text.startswith("ssh-"):
            raw = base64.b64decode(text.split()[1], validate=True)
            label = base64.b64encode(hashlib.sha256(raw).digest()).decode().rstrip("=")
            return PublicKey(pyrage.ssh.Recipient.from_str(text), f"SHA256:{label}")
        return PublicKey(pyrage.x25519.Recipient.from_str(text), text)
    except (pyrage.RecipientError, IndexError, binascii.Error):
        kind = "a secret key" if text.startswith(_SECRET) else "not a usable public key"
        raise UserError(f"{where}: this is {kind}; pass an {_KINDS} public key") from None


def identities(path: Path) -> list[Any]:
    """Return the secret keys in ``path``: lines as ``age-keygen`` writes them, or one ssh private
    key. Raises UserError."""
    refuse_secret(str(path), "--identity")
    data = read_bytes(path, _MOST_BYTES)
    if data.startswith(b"age-encryption.org/"):
        raise UserError(f"--identity {path} is itself sealed: open it first, with `age -d`")
    try:
        if data.startswith(b"-----BEGIN"):
            return [pyrage.ssh.Identity.from_buffer(data)]
        found = [pyrage.x25519.Identity.from_str(line) for _, line in _lines(path)]
    except pyrage.IdentityError as error:
        if "decrypted first" in str(error):
            raise UserError(
                f"--identity {path} is protected by a passphrase, which cannot be asked for here: "
                "pass a copy without one (ssh-keygen -p), or use an age key"
            ) from None
        found = []
    if not found:
        raise UserError(
            f"--identity {path} contains no usable secret key: age ({_SECRET}...), ssh-ed25519 or "
            "ssh-rsa is needed"
        )
    return found


def read_passphrase(file: Path | None, *, confirm: bool) -> Passphrase:
    """Return the first line of ``file`` (/dev/fd/N for a descriptor), or ask on the terminal."""
    if file is not None:
        if not os.path.exists(file):
            raise UserError(
                "--passphrase-file names no file; what was given is not repeated here, as it may "
                "be the passphrase itself: write that into a file, or use --passphrase to type it"
            )
        lines = _text(file, pipe=True).splitlines()
        text = lines[0] if lines else ""
    else:
        try:
            text = getpass.getpass("Passphrase: ")
            if confirm and getpass.getpass("Again: ") != text:
                raise UserError("the two passphrases differ; nothing was written")
        except EOFError:
            raise UserError("no passphrase was typed: use --passphrase-file") from None
    if not text:
        raise UserError(f"the passphrase {f'in {file} ' if file else ''}is empty")
    return Passphrase(text)


def new_identity(path: Path) -> str:
    """Write a new secret key (0600, as ``age-keygen`` does); return its public key."""
    if path.exists():
        raise UserError(f"--out {path} already exists: a secret key is never overwritten")
    identity = pyrage.x25519.Identity.generate()
    public = str(identity.to_public())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"# created: {created}\n# public key: {public}\n{identity}\n"
    try:
        write_text(path, text, private=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None
    return public


def encrypt(data: bytes, to: Sequence[PublicKey] | Passphrase) -> bytes:
    if isinstance(to, Passphrase):
        return bytes(pyrage.passphrase.encrypt(data, to.text))
    return bytes(pyrage.encrypt(data, [key.recipient for key in to]))


def decrypt(sealed: bytes, by: Sequence[Any] | Passphrase, where: Path) -> bytes:
    """Return the content of a file sealed here or by `age`. Raises UserError that names the file
    as ``where`` and says only whether the key or the file is at fault."""
    require_sealed(sealed, where)
    try:
        if isinstance(by, Passphrase):
            return bytes(pyrage.passphrase.decrypt(sealed, by.text))
        return bytes(pyrage.decrypt(sealed, by))
    except pyrage.DecryptError as error:
        raise UserError(f"{where} {_reason(str(error), isinstance(by, Passphrase))}") from None


def require_sealed(start: bytes, where: Path) -> None:
    """Raise UserError unless ``start``, the first bytes of ``where``, contain a whole age header;
    an endless one keeps pyrage busy for minutes."""
    start = start[:MOST_HEADER]
    if start.startswith(_ARMOR):
        letters = b"".join(start.removeprefix(_ARMOR).partition(b"-----END")[0].split())
        with contextlib.suppress(binascii.Error):
            start = base64.b64decode(letters[: len(letters) // 4 * 4])
    if not start.startswith(b"age-encryption.org/") or b"\n--- " not in start:
        raise UserError(f"{where} is not a sealed file, or its first lines are damaged")


def _reason(message: str, by_passphrase: bool) -> str:
    if "No matching keys" in message:
        if by_passphrase:
            return "was not sealed with a passphrase: pass the key that opens it with --identity"
        return (
            "does not open with this key: it was sealed for another one, or with a passphrase, or "
            "its first lines are damaged"
        )
    if message == "Decryption failed":
        return "does not open: the passphrase is wrong, or its first lines are damaged"
    if "Header is invalid" in message:
        return "is not a sealed file, or its first lines are damaged"
    if "work" in message.lower():
        return "requires more work than a passphrase should: do not trust it"
    return "is damaged or cut off: ask for it again"


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (number from 1, text) of the lines that are neither empty nor comments."""
    lines = enumerate((line.strip() for line in _text(path).splitlines()), start=1)
    return [(n, line) for n, line in lines if line and not line.startswith("#")]


def _text(path: Path, *, pipe: bool = False) -> str:
    try:
        return read_bytes(path, _MOST_BYTES, pipe=pipe).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: it contains no key or passphrase") from None
