"""Every format that pmp-ds writes for itself: its versions, and those that this version reads.

    python -m pmp_ds.formats > docs/FORMATS.md

Readers call ``require`` with the version that they found. So a file of another version gives the
same message everywhere, and is never mistaken for a damaged one.
"""

from dataclasses import dataclass

from pmp_ds.errors import UserError
from pmp_ds.version import code_version


class FormatError(UserError):
    """A file is intact, but has a format version that this pmp-ds does not read."""


@dataclass(frozen=True)
class Version:
    """One version of a format."""

    number: int
    written_by: str
    """The pmp-ds versions that write or wrote it."""

    content: str
    """Its content, or the change from the version before."""


@dataclass(frozen=True)
class Format:
    """One kind of file or folder."""

    what: str
    where: str
    versions: tuple[Version, ...]  # oldest first; the last is written
    reads: tuple[int, ...]
    older: str
    """The rule for reading older versions."""


_NOW = "pmp-ds 0.2.0"
_BETWEEN = "a development version of pmp-ds 0.2.0"
_FIRST = "pmp-ds 0.1.0"
_BEFORE = "a development version of pmp-ds 0.1.0"

FORMATS = {
    "checkpoint": Format(
        "checkpoint",
        "`private/checkpoints/*/manifest.json`",
        (
            Version(
                1,
                f"{_BEFORE} before commit 7175ad3",
                "weights and optimizer state of masked pretraining",
            ),
            Version(
                2,
                f"{_BEFORE} from commit 7175ad3 on",
                "checkpoints of discovery, the memory of the guard, a digest of the manifest",
            ),
            Version(
                3,
                _FIRST,
                "version and commit of the code (`code`); unknown fields are ignored; "
                "persistent buffers are among the weights of the architectures that have some",
            ),
            Version(
                4,
                _BETWEEN,
                "moments may be in bf16, and `master_low`, the lower bits of fp32 master weights, "
                "may replace these",
            ),
            Version(
                5,
                _NOW,
                "the candidate masks of discovery are in the ranks' files, not in one of their own",
            ),
        ),
        (2, 3, 4, 5),
        "2 has everything that a run needs to resume; `code` is then unknown. 1 lacks the guard's "
        "memory and the digest: it is refused, and no older checkpoint is used instead.",
    ),
    "ticket": Format(
        "ticket",
        "`private/ticket/ticket.json`, also in sealed files",
        (Version(1, _FIRST, "packed bits and their origin"),),
        (1,),
        "none.",
    ),
    "store": Format(
        "store",
        "`tokenized_data/NAME/manifest.json`",
        (Version(1, _FIRST, "packed Arrow blocks; the number is part of the dataset id"),),
        (1,),
        "none.",
    ),
    "ledger": Format(
        "ledger",
        "`private/ledger.jsonl`, in each line",
        (Version(1, _FIRST, "one line per release"),),
        (1,),
        "none. An unreadable line blocks every release.",
    ),
    "results": Format(
        "results",
        "`results.jsonl`, in each line",
        (
            Version(1, _BEFORE, "a measurement; the line has no number"),
            Version(2, _FIRST, "`format_version`, and the commit of the code (`commit`)"),
        ),
        (1, 2),
        "A line without a number is version 1; its commit is unknown. One file may have "
        "lines of both.",
    ),
    "audit": Format(
        "audit",
        "`private/audit/audit.json`",
        (Version(1, _FIRST, "the verdict and the figures of each attack"),),
        (1,),
        "none.",
    ),
    "registry": Format(
        "registry",
        "`private/vault/sealed.jsonl`, in each line",
        (
            Version(1, _BEFORE, "a sealed copy; the line has no number"),
            Version(2, f"{_BEFORE} before 2026-11-28", "`format_version`"),
            Version(3, _FIRST, "the copy is marked by a code that resists coalitions"),
        ),
        (1, 2, 3),
        "A line without a number is version 1. Copies of older versions are listed; `trace` names "
        "the pmp-ds that can trace them.",
    ),
    "data": Format(
        "data",
        "`data.json`",
        (
            Version(1, _BEFORE, "a run's facts about its tokens; the file has no number"),
            Version(2, _FIRST, "`format_version`"),
        ),
        (1, 2),
        "A file without a number is version 1. It is never rewritten.",
    ),
    "theta0": Format(
        "theta0",
        "`private/init/theta0.json`",
        (
            Version(1, _BEFORE, "the digest of theta(0); the file has no number"),
            Version(
                2,
                f"{_BEFORE} before 2026-11-28",
                "`format_version`, and for secret initial "
                "weights the one-way check value of the key (`key_check`)",
            ),
            Version(3, _FIRST, "the digest is sealed with the key (`seal`)"),
            Version(
                4,
                _BETWEEN,
                "`digest` is `chunks`: the digest is that of the digests of chunks of 4 Mi "
                "elements, which ranks compute together; without it, of all bytes in one sequence",
            ),
            Version(
                5,
                _NOW,
                "`source` is `given`, and sealed with the digest, if theta(0) came from "
                "`init.weights`, else `drawn`; the digest of a given one covers frozen "
                "parameters and persistent buffers too",
            ),
        ),
        (1, 2, 3, 4, 5),
        "A file without a number is version 1. The next start of `pmp-ds pretrain` rewrites "
        "it as version 5, with the digest that it has; until then `pmp-ds vault` draws theta(0) "
        "again to check the key (1), and `pmp-ds export` to check the digest (1, 2).",
    ),
    "backup": Format(
        "backup",
        "`backup.json` in the sealed file of `pmp-ds backup`",
        (Version(1, _NOW, "digests of the files; which files there are is no part of the format"),),
        (1,),
        "none.",
    ),
}


def current(name: str) -> int:
    """Return the version of format ``name`` that is written."""
    return FORMATS[name].versions[-1].number


def writer(name: str, number: int) -> str:
    """Return the pmp-ds that wrote version ``number`` of format ``name``."""
    return next(v.written_by for v in FORMATS[name].versions if v.number == number)


def require(name: str, where: object, found: object, *, way_out: str, writer: object = None) -> int:
    """Return the version ``found`` of the file at ``where``.

    Raises FormatError when this pmp-ds does not read it. The message names a pmp-ds that does, from
    the table, or for an unlisted version the ``writer`` recorded in the file. Raises TypeError when
    ``found`` is not a number, a sign of damage.
    """
    if not isinstance(found, int) or isinstance(found, bool):
        raise TypeError("format_version is not a number")
    form = FORMATS[name]
    if found in form.reads:
        return found
    later = writer if isinstance(writer, str) else "a later version of pmp-ds"
    reader = {version.number: version.written_by for version in form.versions}.get(found, later)
    *others, last = map(str, form.reads)
    reads = f"{', '.join(others)} and {last}" if others else last
    raise FormatError(
        f"{form.what} {where} has format {found}, which {reader} reads; this is {code_version()}, "
        f"which reads format{'s' * (len(form.reads) > 1)} {reads}: {way_out}"
    )


def document() -> str:
    """Return docs/FORMATS.md."""
    lines = [
        "# Formats",
        "",
        "Generated by `python -m pmp_ds.formats > docs/FORMATS.md`. Files that pmp-ds writes for",
        "itself carry a format version. An unsupported version is refused with a line that names a",
        "pmp-ds that reads it, and nothing is changed. The version rises when an older pmp-ds",
        "could not read the new files. This pmp-ds writes the last row of each table.",
    ]
    for form in FORMATS.values():
        reads = ", ".join(map(str, form.reads))
        lines += ["", f"## {form.what.capitalize()}", "", f"{form.where}; reads {reads}.", ""]
        lines += ["| version | written by | content, or change |", "|---|---|---|"]
        lines += [f"| {v.number} | {v.written_by} | {v.content} |" for v in form.versions]
        lines += ["", f"Older versions: {form.older}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
