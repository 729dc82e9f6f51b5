"""What a run cannot be repeated or released without, in one archive that is only ever sealed.

    archive = archived(run.root.name, gathered(run))      backup.py
    backup = read_archive(archive, where)                 every file compared with its digest

In it: the key, the ticket, the ledger, the registry of sealed copies, and so that the run can go
on or be repeated, config.yaml, data.json and the tokenizer. Not in it: checkpoints, weights, data.
restore.py writes it back. Imports no torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pmp_ds import formats
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.foreign import parse_object
from pmp_ds.ticket.archive import pack, unpack
from pmp_ds.version import code_version

MANIFEST = "backup.json"
MOST_BYTES = 1 << 35
"""Maximum size of a file: the ticket of 250 billion parameters."""

_NAME = r"[A-Za-z0-9_][\w.+-]*"
_NAMES = re.compile(
    rf"config\.yaml|data\.json|private/ledger\.jsonl|tokenizer(/{_NAME}){{1,4}}"
    rf"|private/(init|ticket|vault)/{_NAME}",
    re.ASCII,
)
"""What a backup may contain, and so what a restore may write."""


@dataclass(frozen=True, kw_only=True)
class Backup:
    """The content of a backup, which agrees with its digests."""

    run: str
    """Name of the run's folder."""

    date: str
    """UTC, to the second."""

    files: Mapping[str, bytes]
    """By path in the run's folder."""


def archived(name: str, files: Mapping[str, bytes]) -> bytes:
    """Return a tar of ``files`` of the run ``name`` with their digests: to be sealed."""
    for file in files:
        require(_NAMES.fullmatch(file) is not None, f"{file}: a backup has no file of this name")
    manifest = {
        "format_version": formats.current("backup"),
        "code": str(code_version()),
        "run": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "files": {file: _digest(content) for file, content in files.items()},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    return pack({MANIFEST: text.encode(), **files})


def read_archive(archive: bytes, where: Path) -> Backup:
    """Return the content of an opened backup. Raises UserError when it is not one, lacks a file, or
    has one with another digest; the message names files, never content."""

    def known(name: str) -> str | None:
        return name if name == MANIFEST or _NAMES.fullmatch(name) else None

    files = unpack(archive, known, where, "opens with this key, but is not a backup of a run")
    if MANIFEST not in files:
        raise UserError(f"{where} opens with this key, but is not a backup of a run")
    try:
        manifest = parse_object(files.pop(MANIFEST))
        version = manifest.pop("format_version", None)
        formats.require(
            "backup",
            where,
            version,
            writer=manifest.get("code"),
            way_out="restore it with that version",
        )
        place = f"{where}: {MANIFEST}"
        listed = fit(dict[str, str], manifest.get("files"), place)
        run, date = (fit(str, manifest.get(name), place) for name in ("run", "date"))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: {MANIFEST}: {error}") from None
    for name in sorted(listed.keys() ^ files.keys()):
        what = "lacks" if name in listed else "has the unlisted file"
        raise UserError(f"{where} is damaged: it {what} {name!r:.80}")
    for name, content in files.items():
        if _digest(content) != listed[name]:
            raise UserError(f"{where} is damaged: {name} does not match its digest")
    return Backup(run=run, date=date, files={name: files[name] for name in listed})


def in_words(files: Mapping[str, bytes]) -> str:
    """Return what is in a backup, and what its run did not have."""
    has = {
        "the key": "private/init/key",
        "the ticket": "private/ticket/ticket.json",
        "the ledger": "private/ledger.jsonl",
        "the registry of sealed copies": "private/vault/sealed.jsonl",
    }
    inside = [what for what, name in has.items() if name in files]
    without = [what for what, name in has.items() if name not in files]
    text = ", ".join([*inside, "config.yaml, data.json and the tokenizer"])
    return text + (f" (the run did not have: {', '.join(without)})" if without else "")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
