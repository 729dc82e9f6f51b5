"""Where documents come from: files, folders, and the running interpreter itself.

``find_sources`` lists the input files in a fixed order, ``group_units`` makes work units of them,
``read_documents`` yields the documents of one file and counts the rows it had to reject.
"""

import gzip
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from pmp_ds.errors import UserError

PYTHON = "python"
"""The input that stands for the interpreter's documentation and standard-library sources."""

UNIT_BYTES = 64 << 20
"""Files are grouped, in order, into work units of about this size."""

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_HOPELESS_ROWS = 1000
_REPORT_BYTES = 1 << 18

Kind = Literal["text", "jsonl", "topics"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file (or the interpreter's documentation, which is no file)."""

    given: str
    """The entry of ``input`` that it comes from."""

    name: str
    """What reports and the manifest call it: the input as given, and the path below it."""

    path: Path
    kind: Kind
    num_bytes: int
    """Size on disk; of compressed files, compressed."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files that are packed together, as one token stream with its own shards."""

    index: int
    sources: tuple[Source, ...]

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)


@dataclass
class Rejects:
    """Rows read and rejected, with the first example (file:line) of every reason."""

    max_malformed: float = 0.01
    """Largest share of malformed rows that ``check`` accepts."""

    rows: int = 0
    empty: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Malformed rows by reason; empty documents are not malformed."""

    examples: dict[str, str] = field(default_factory=dict)

    @property
    def malformed(self) -> int:
        return self.counts.total()

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, where)
        if self.rows >= _HOPELESS_ROWS and self.malformed > self.rows // 2:
            self.check()

    def add_empty(self, where: str) -> None:
        self.empty += 1
        self.examples.setdefault("empty document", where)

    def check(self) -> None:
        """Raise UserError when more than ``max_malformed`` of the rows were malformed."""
        if self.malformed > self.max_malformed * self.rows:
            raise UserError(
                f"{self.malformed} of {self.rows} rows are malformed (at most "
                f"{self.max_malformed:.4g} of them may be): "
                f"{'; '.join(self.describe(with_empty=False))}; "
                "mend or remove them, set text_field to the field that holds the text, or raise "
                "max_malformed"
            )

    def merge(self, later: "Rejects") -> None:
        """Add what was met after everything here."""
        self.rows += later.rows
        self.empty += later.empty
        self.counts.update(later.counts)
        self.examples = {**later.examples, **self.examples}

    def describe(self, *, with_empty: bool = True) -> list[str]:
        """One phrase per reason, most frequent first."""
        counts = self.counts.most_common()
        if with_empty and self.empty:
            counts.append(("empty document", self.empty))
        return [f"{n} x {reason} (first: {self.examples[reason]})" for reason, n in counts]


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """All input files in the order of ``inputs``; files of a folder in the order of their paths.

    Raises UserError for a path that does not exist, a file of an unknown type, a folder without
    any known file, and a file that is named twice.
    """
    sources: list[Source] = []
    for given in inputs:
        sources += _python_sources() if given == PYTHON else _path_sources(given)
    seen: dict[tuple[str, Path], str] = {}
    for source in sources:
        key = (source.kind, source.path.resolve())
        if key in seen:
            raise UserError(
                f"input names {source.path} twice ({seen[key]} and {source.name}): its documents "
                "would count double; name it once"
            )
        seen[key] = source.name
    return sources


def group_units(sources: Iterable[Source], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Consecutive sources together until ``unit_bytes`` are reached; depends on nothing else."""
    groups: list[list[Source]] = []
    room = 0
    for source in sources:
        if not groups or source.num_bytes > room:
            groups.append([])
            room = unit_bytes
        groups[-1].append(source)
        room -= source.num_bytes
    return [Unit(index=i, sources=tuple(group)) for i, group in enumerate(groups)]


def read_documents(
    source: Source,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Iterator[str]:
    """The documents of one source in file order, never empty, always encodable as UTF-8.

    Rows that are no document are counted in ``rejects``; ``on_bytes`` hears how many more bytes of
    the file are done. Raises UserError for a file that cannot be read or decompressed.
    """
    try:
        if source.kind == "topics":
            yield from _accepted(_topics(), rejects)
            on_bytes(source.num_bytes)
        elif source.kind == "text":
            yield from _accepted([(source.name, source.path.read_bytes())], rejects)
            on_bytes(source.num_bytes)
        else:
            with open(source.path, "rb") as raw:
                yield from _json_documents(source, raw, text_field, rejects, on_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"input {source.path} cannot be read: {error}") from error


def _path_sources(given: str) -> list[Source]:
    root = Path(given)
    if root.is_dir():
        # Compared as text, so that the order is that of the printed names.
        paths = [
            path
            for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix())
            if path.name.endswith(_SUFFIXES) and path.is_file()
        ]
        if not paths:
            raise UserError(f"input {given} holds no {', '.join(_SUFFIXES)} file")
        prefix = given.rstrip("/")
        return [
            _file_source(given, f"{prefix}/{path.relative_to(root).as_posix()}", path)
            for path in paths
        ]
    if not root.exists():
        raise UserError(
            f"input {given} does not exist; name a file, a folder, or `{PYTHON}` for the "
            "interpreter's own documentation and sources"
        )
    if not root.name.endswith(_SUFFIXES):
        raise UserError(f"input {given} is not a {', '.join(_SUFFIXES)} file or a folder of them")
    return [_file_source(given, given, root)]


def _file_source(given: str, name: str, path: Path) -> Source:
    kind: Kind = "text" if path.name.endswith(".txt") else "jsonl"
    return Source(given=given, name=name, path=path, kind=kind, num_bytes=path.stat().st_size)


def _python_sources() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    topics = root / "pydoc_data" / "topics.py"
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_STDLIB]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths = sorted(set(paths) - {topics}, key=lambda path: path.relative_to(root).as_posix())
    num_bytes = sum(len(text) for _, text in _topics())
    return [
        Source(
            given=PYTHON,
            name=f"{PYTHON}:topics",
            path=topics,
            kind="topics",
            num_bytes=num_bytes,
        ),
        *(
            Source(
                given=PYTHON,
                name=f"{PYTHON}:{path.relative_to(root).as_posix()}",
                path=path,
                kind="text",
                num_bytes=path.stat().st_size,
            )
            for path in paths
        ),
    ]


def _topics() -> list[tuple[str, bytes]]:
    """The texts behind ``help('...')``, as (name, UTF-8)."""
    from pydoc_data.topics import topics

    return [(f"{PYTHON}:topics:{name}", topics[name].encode("utf-8")) for name in sorted(topics)]


def _accepted(rows: Iterable[tuple[str, bytes]], rejects: Rejects) -> Iterator[str]:
    """Rows that are a document as they are."""
    for where, raw in rows:
        rejects.rows += 1
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            rejects.add("invalid UTF-8", f"{where}:{line}")
            continue
        if text.strip():
            yield text
        else:
            rejects.add_empty(where)


def _json_documents(
    source: Source,
    raw: BinaryIO,
    text_field: str,
    rejects: Rejects,
    on_bytes: Callable[[int], None],
) -> Iterator[str]:
    lines: Iterable[bytes] = raw
    if source.path.name.endswith(".gz"):
        lines = gzip.GzipFile(fileobj=raw)
    done = 0
    for number, line in enumerate(lines, start=1):
        if raw.tell() - done > _REPORT_BYTES:
            on_bytes(raw.tell() - done)
            done = raw.tell()
        if not line.strip():
            continue
        rejects.rows += 1
        where = f"{source.name}:{number}"
        text, reason = _parse_row(line, text_field)
        if text is None:
            rejects.add(reason, where)
        elif text.strip():
            yield text
        else:
            rejects.add_empty(where)
    on_bytes(source.num_bytes - done)


def _parse_row(line: bytes, text_field: str) -> tuple[str | None, str]:
    """The text of one JSON line, or None and what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "invalid UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(row, dict):
        return None, "not a JSON object"
    if text_field not in row:
        return None, f"no field {text_field!r}"
    text = row[text_field]
    if not isinstance(text, str):
        return None, f"field {text_field!r} is not a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800": JSON can spell half a character
        return None, "half of a surrogate pair"
    return text, ""
