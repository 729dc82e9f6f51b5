"""The release ledger, which prevents a second release from the same theta(0) by mistake.

    private/ledger.jsonl   0600, one line per release, appended and fsynced before it appears

Two sets of weights from one theta(0) differ exactly on the ticket: their difference is the mask.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pmp_ds import formats
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import MissingError, parse_object, read_bytes
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import lock

FORMAT_VERSION = formats.current("ledger")
FLAG = "--another-revision"
Kind = Literal["final", "intermediate", "derivative"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One release."""

    date: str
    """Day, YYYY-MM-DD."""

    lineage: str
    """Digest of theta(0); for a derivative of a base in no ledger here, the digest of that base."""

    kind: Kind
    updates: int | None
    weights: str
    """`Source.digest` of the exported weights, in the run's own dtype."""

    released: str
    """`Source.digest` of the release itself."""

    dtype: str
    reason: str | None
    """The reason to release although the mask may show; None if nothing was against it."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A release that asks the ledger ``path`` for permission; other fields as in Entry."""

    path: Path
    lineage: str
    kind: Kind
    updates: int | None
    date: str
    reason: str | None

    def check(self, weights: str) -> None:
        """Raise UserError when releasing ``weights`` would reveal the mask and no reason is given.
        The same weights again, in any form, are not a second revision."""
        _check(self, read(self.path), weights)

    def record(self, weights: str, released: str, dtype: str) -> None:
        """Check again, with no other export in between, and write the line."""
        given = {name: value for name, value in vars(self).items() if name != "path"}
        entry = Entry(weights=weights, released=released, dtype=dtype, **given)
        line = json.dumps(asdict(entry) | {"format_version": FORMAT_VERSION}, sort_keys=True)
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            lock(file)
            _check(self, read(self.path), weights)
            whole = file.read()
            if unfinished := _unfinished(whole):
                whole = whole[: -len(unfinished)]  # from an export that lost power
            file.seek(len(whole))
            file.truncate()
            end = b"\n" if whole and not whole.endswith(b"\n") else b""
            file.write(end + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> tuple[Entry, ...]:
    """Return all entries, oldest first; none without a file. Raises UserError when damaged."""
    try:
        whole = read_bytes(path)
    except MissingError:
        return ()
    whole = whole.removesuffix(_unfinished(whole)).removesuffix(b"\n")
    entries = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        where = f"{path}, line {number},"
        try:
            values = parse_object(line)
            version = fit(int, values.pop("format_version", None), "format_version")
            formats.require("ledger", where, version, way_out="export with that version")
            entries.append(fit(Entry, values, "it"))
        except FormatError:
            raise
        except (ValueError, UserError) as error:
            raise UserError(
                f"{where} is damaged ({error}): restore the file from a backup; without it nothing "
                "may be released, because earlier releases are unknown"
            ) from None
    return tuple(entries)


def _unfinished(content: bytes) -> bytes:
    """Return the last line if it is incomplete; whole JSON is an entry, with or without newline."""
    last = content.rpartition(b"\n")[2]
    try:
        parse_object(last)
    except ValueError:
        return last
    return b""


def lineage_of(entries: Sequence[Entry], released: str) -> str:
    """Return the theta(0) of a release, or the release's own digest if that is not known."""
    return next((e.lineage for e in entries if e.released == released), released)


def _check(claim: Claim, entries: Sequence[Entry], weights: str) -> None:
    others = [entry for entry in entries if entry.lineage == claim.lineage]
    if claim.reason or any(entry.weights == weights for entry in others):
        return
    if claim.kind == "derivative":
        others = [entry for entry in others if entry.kind == "derivative"]
    if others:
        last = others[-1]
        what = "a derivative" if claim.kind == "derivative" else _named(last)
        raise UserError(
            f"{what} from the same initial weights was released on {last.date} ({claim.path}). "
            "Only the ticket differs between two of them, so their difference is the mask: anyone "
            f"with both can compute it. Keep this one, or give a reason to release it: {FLAG} "
            "REASON"
        )
    if claim.kind == "intermediate":
        raise UserError(
            f"update {claim.updates:,} is an intermediate checkpoint. Once a later one is released "
            "too, the difference of the two is the mask. Finish the run first, use --private for a "
            f"folder that stays here, or give a reason to release this one: {FLAG} REASON"
        )


def _named(entry: Entry) -> str:
    return f"the {entry.kind} release" + (f" (update {entry.updates:,})" if entry.updates else "")
