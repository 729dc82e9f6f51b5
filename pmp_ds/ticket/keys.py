"""Who may open a sealed file: age and ssh keys or a passphrase, by way of `pyrage`.

    sealed = encrypt(data, public_keys(["partner.pub"]))         data = decrypt(sealed, identities)

The format is that of the `age` command, in both directions. No error shows a key or any content.
"""

import base64
import binascii
import contextlib
import getpass
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrage

from pmp_ds.errors import UserError
from pmp_ds.foreign import read_bytes
from pmp_ds.run_dir import write_text

_KINDS = "age (age1...), ssh-ed25519 or ssh-rsa"
_SECRET = "AGE-SECRET-KEY-"
_MOST_BYTES = 1 << 20  # of a file of keys
MOST_HEADER = 1 << 16  # of a sealed file: a hundred recipients
_ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"


@dataclass(frozen=True)
class PublicKey:
    """What a file is sealed for. ``label`` is an age key as it stands, or what ``ssh-keygen -l``
    says of an ssh key."""

    recipient: Any
    label: str


@dataclass(frozen=True)
class Passphrase:
    """Opens and seals like a key; does not show itself."""

    text: str

    def __repr__(self) -> str:
        return "Passphrase(...)"


def public_keys(given: Sequence[str]) -> list[PublicKey]:
    """Each of ``given`` is a public key, or a file with one on each line. Raises UserError."""
    keys: list[PublicKey] = []
    for word in given:
        if word.startswith(("age1", "ssh-")):
            keys.append(_public_key(word, "--to"))
        elif word.startswith(_SECRET):
            raise UserError("--to is given a secret key: give the public one, which starts age1")
        else:
            path = Path(word)
            keys += [_public_key(line, f"{path}, line {n}") for n, line in _lines(path)]
    if not keys:
        raise UserError(f"--to {' '.join(given)}: no public key in there")
    return keys


def _public_key(text: str, where: str) -> PublicKey:
    try:
        if text.startswith("ssh-"):
            raw = base64.b64decode(text.split()[1], validate=True)
            label = base64.b64encode(hashlib.sha256(raw).digest()).decode().rstrip("=")
            return PublicKey(pyrage.ssh.Recipient.from_str(text), f"SHA256:{label}")
        return PublicKey(pyrage.x25519.Recipient.from_str(text), text)
    except (pyrage.RecipientError, IndexError, binascii.Error):
        kind = "a secret key" if text.startswith(_SECRET) else "no public key that can be used"
        raise UserError(f"{where}: this is {kind}; an {_KINDS} public key is needed") from None


def identities(path: Path) -> list[Any]:
    """The secret keys in ``path``: lines as ``age-keygen`` writes them, or one ssh private key.
    Raises UserError."""
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
                "give a copy without one (ssh-keygen -p), or use an age key"
            ) from None
        found = []
    if not found:
        raise UserError(
            f"--identity {path} holds no usable secret key: age ({_SECRET}...), ssh-ed25519 or "
            "ssh-rsa is needed"
        )
    return found


def read_passphrase(file: Path | None, *, confirm: bool) -> Passphrase:
    """The first line of ``file`` (/dev/fd/N for a descriptor), or asked for on the terminal."""
    if file is not None:
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
    """Write a new secret key (0600, as ``age-keygen`` does); its public key."""
    if path.exists():
        raise UserError(f"--out {path} exists already: a secret key is never overwritten")
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
    """The content of a file sealed here or by `age`. Raises UserError that says whether the key or
    the file is at fault, and nothing else; ``where`` names the file in it."""
    require_sealed(sealed, where)
    try:
        if isinstance(by, Passphrase):
            return bytes(pyrage.passphrase.decrypt(sealed, by.text))
        return bytes(pyrage.decrypt(sealed, by))
    except pyrage.DecryptError as error:
        raise UserError(f"{where} {_reason(str(error), isinstance(by, Passphrase))}") from None


def require_sealed(start: bytes, where: Path) -> None:
    """Raises UserError unless ``start``, the first bytes of ``where``, hold a whole header of age:
    one without an end keeps pyrage busy for minutes."""
    start = start[:MOST_HEADER]
    if start.startswith(_ARMOR):
        letters = b"".join(start.removeprefix(_ARMOR).partition(b"-----END")[0].split())
        with contextlib.suppress(binascii.Error):
            start = base64.b64decode(letters[: len(letters) // 4 * 4])
    if not start.startswith(b"age-encryption.org/") or b"\n--- " not in start:
        raise UserError(f"{where} is no sealed file, or its first lines are damaged")


def _reason(message: str, by_passphrase: bool) -> str:
    if "No matching keys" in message:
        if by_passphrase:
            return "was not sealed with a passphrase: give the key that opens it with --identity"
        return (
            "does not open with this key: it was sealed for another one, or with a passphrase, or "
            "its first lines are damaged"
        )
    if message == "Decryption failed":
        return "does not open: the passphrase is wrong, or its first lines are damaged"
    if "Header is invalid" in message:
        return "is no sealed file, or its first lines are damaged"
    if "work" in message.lower():
        return "asks for more work than a passphrase should: do not trust it"
    return "is damaged or cut off: ask for it again"


def _lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are neither empty nor comments."""
    lines = enumerate((line.strip() for line in _text(path).splitlines()), start=1)
    return [(n, line) for n, line in lines if line and not line.startswith("#")]


def _text(path: Path, *, pipe: bool = False) -> str:
    try:
        return read_bytes(path, _MOST_BYTES, pipe=pipe).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text: it holds no key or passphrase") from None
