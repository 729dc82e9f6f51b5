"""Sealed tickets: a ticket's folder as one file that only its recipient can open.

    sealed = seal(ticket, public_keys(["partner.pub"]))
    ticket = open_sealed(Path("partner.age"), identities(Path("key.txt")))

Inside the age file is a plain tar of `ticket/`, so standard tools open it too:
`age -d -i key.txt partner.age | tar x`. Equal tickets give equal archives. A run records the
recipient of each copy in a line of private/vault/sealed.jsonl.
"""

import contextlib
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pmp_ds import formats
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import parse_object, read_bytes, read_text
from pmp_ds.run_dir import make_private
from pmp_ds.ticket.archive import pack, unpack
from pmp_ds.ticket.keys import MOST_HEADER, Passphrase, PublicKey, decrypt, encrypt, require_sealed
from pmp_ds.ticket.ticket import (
    MANIFEST_FILE,
    MASK_FILE,
    Ticket,
    from_files,
    load_ticket,
    to_files,
)

FOLDER = "ticket"
RECORDS_FILE = "sealed.jsonl"
_MOST_BYTES = 1 << 35
"""Maximum size of a sealed file: the ticket of 250 billion parameters."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the registry: a sealed copy."""

    name: str  # of the recipient
    keys: tuple[str, ...]  # labels of the public keys; none for a passphrase
    date: str  # UTC, to the second
    watermark: str | None  # number of the watermark in hex, None: an unmarked copy
    file: str  # where the sealed file was written
    by_code: bool = True  # False: marked by an older pmp-ds with its own method


def seal(ticket: Ticket, to: Sequence[PublicKey] | Passphrase) -> bytes:
    """Return the sealed file for the holders of ``to``."""
    return encrypt(_archive(to_files(ticket)), to)


def open_sealed(file: Path, by: Sequence[Any] | Passphrase) -> Ticket:
    """Return the ticket in a sealed file. Raises UserError for a wrong key or a damaged or foreign
    file, without revealing its content."""
    require_sealed(read_bytes(file, _MOST_BYTES, only=MOST_HEADER), file)
    sealed = read_bytes(file, _MOST_BYTES)
    members = _members(decrypt(sealed, by, file), file)
    return from_files(lambda name, _: members[name], file)


def any_ticket(path: Path, by: Sequence[Any] | Passphrase | None) -> Ticket:
    """Return the ticket in a folder, or in a sealed file that ``by`` opens."""
    if path.is_dir():
        return load_ticket(path)
    if by is None and path.exists():
        raise UserError(f"{path} is a sealed file: pass --identity KEY or --passphrase")
    return load_ticket(path) if by is None else open_sealed(path, by)


def begin(vault: Path) -> None:
    """Create an empty registry in ``vault`` if there is no vault yet."""
    if not vault.exists():
        make_private(vault)
        os.close(os.open(vault / RECORDS_FILE, os.O_WRONLY | os.O_CREAT, 0o600))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remember(vault: Path, record: Record) -> None:
    """Append ``record`` to the registry in ``vault``; it is on disk on return."""
    make_private(vault)
    values = asdict(record) | {"format_version": formats.current("registry")}
    del values["by_code"]
    line = json.dumps(values, ensure_ascii=False) + "\n"
    fd = os.open(vault / RECORDS_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        with writing(vault / RECORDS_FILE):
            if (size := os.fstat(fd).st_size) and os.pread(fd, 1, size - 1) != b"\n":
                line = "\n" + line  # an editor removed the final newline
            os.write(fd, line.encode())
            os.fsync(fd)
    finally:
        os.close(fd)


def records(vault: Path) -> list[Record]:
    """Return the records of all sealed copies, oldest first. Raises UserError that names a damaged
    line, or says that a vault has lost its registry."""
    path, found = vault / RECORDS_FILE, []
    if vault.is_dir() and not path.exists():
        raise UserError(
            f"{path} is missing: restore it from a backup, because it records whose copies were "
            f"sealed; if there were none, delete {vault}"
        )
    text = read_text(path) if path.exists() else ""
    for number, line in enumerate(io.StringIO(text), start=1):
        where = f"{path}, line {number}"
        try:
            values = parse_object(line)
        except ValueError as error:
            raise UserError(f"{where} is damaged: {error}; repair or delete it") from None
        version = fit(int, values.pop("format_version", 1), f"{where}: format_version")
        formats.require("registry", f"{where},", version, way_out="use that version")
        found.append(replace(fit(Record, values, where), by_code=version >= 3))
    return found


def recipient(given: str) -> str:
    """Return a recipient's name in canonical form: NFKC, with single spaces. Raises UserError when
    it is empty or contains unprintable characters, such as a change of writing direction."""
    name = " ".join(unicodedata.normalize("NFKC", given).split())
    if not name:
        raise UserError("--name is empty: write whom the copy is for")
    if not name.isprintable():
        raise UserError(f"--name {name!r} contains unprintable characters: remove them")
    return name


def _folded(name: str) -> str:
    """Return the same text for all spellings of a name."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_recipient(known: Sequence[Record], name: str, keys: Sequence[PublicKey]) -> None:
    """Raise UserError when ``name`` is another spelling of a known one, or one of ``keys`` has
    another name: two watermarks in one hand reveal where they differ."""
    labels = {key.label for key in keys}
    for record in known:
        if record.name != name and _folded(record.name) == _folded(name):
            raise UserError(
                f"--name {name}: a copy was sealed under the name {record.name!r}, another "
                "spelling of the same; use that name"
            )
        if (shared := labels & set(record.keys)) and record.name != name:
            raise UserError(
                f"--name {name}: a copy for the key {min(shared)} was sealed under the name "
                f"{record.name!r}; use that name, because two watermarks in one hand are visible"
            )


def _archive(files: dict[str, bytes]) -> bytes:
    """Return a tar without times and owners."""
    return pack({f"{FOLDER}/{name}": content for name, content in files.items()})


def _members(archive: bytes, where: Path) -> dict[str, bytes]:
    """Return the files in a tar by name, in whatever folder; nothing is written to disk."""

    def known(path: str) -> str | None:
        name = Path(path).name
        return name if name in (MASK_FILE, MANIFEST_FILE) else None

    return unpack(archive, known, where, "opens with this key, but contains no ticket")
