"""The parts of a corpus: sources, the work units formed from them, and rejected rows.

``inputs.find_sources`` lists the sources in a fixed order, ``group_units`` forms work units, and
``readers.read_documents`` yields a source's documents.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmp_ds.errors import UserError

PYTHON = "python"
"""The input that stands for the interpreter's documentation and standard-library sources."""

STREAM = "hf:"
"""The prefix of an input that is a dataset of the Hugging Face hub, read as a stream."""

UNIT_BYTES = 64 << 20
"""Files are grouped or divided, in order, into work units of at most about this size."""

_MIN_UNIT_BYTES = 16 << 20
_UNITS = 64  # in a medium-sized corpus, so that many cores finish together


class Unfinished(UserError):
    """A fault that another attempt may overcome (a lost process or connection); finished units
    stay."""


class MalformedError(UserError):
    """Too many rows are not documents."""


class EmptySplit(UserError):
    """The settings leave a split without a block; the packed units cannot be reused."""


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Streaming options of a Hugging Face dataset or a folder that `datasets` reads."""

    split: str = "train"
    config: str | None = None
    """The dataset's configuration ("name" in `datasets`)."""

    revision: str | None = None
    shuffle_buffer: int = 50_000
    """Rows in the shuffle buffer; 0 keeps the order."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file or part of one, a stream, or the interpreter's documentation."""

    given: str
    """The entry of ``input`` that it comes from."""

    name: str
    """The name in reports and the manifest: the input as given, and the path below it."""

    path: Path
    kind: str
    """A name in ``readers.READERS`` for a file, or `topics` or `stream`."""

    num_bytes: int
    """Size on disk: compressed if the file is, and of the part if it is one."""

    url: str | None = None
    """For `fsspec`, instead of ``path``."""

    version: str = ""
    """A value that changes with the content, such as a date or an ETag."""

    part: int = 0
    num_parts: int = 1
    """Whether a large file is read in separate parts."""

    first_byte: int = 0
    """The start of a part; in JSON lines, the part has the lines that begin at or after it."""

    stream: StreamOptions | None = None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Files that are packed together, as one token stream with its own shards."""

    index: int
    sources: tuple[Source, ...]

    digest: str = ""
    """sha256 of text that is not in an input file."""

    spooled: bool = False
    """Whether the file is temporary; the process that packs it deletes it."""

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

    sample_rows: int | None = None
    """For a sample: after so many rows, most of them malformed, ``add`` stops the reading. None:
    every row is read, because later ones may be good; ``check`` judges them all."""

    @property
    def malformed(self) -> int:
        return self.counts.total()

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, where)
        if self.sample_rows and self.rows >= self.sample_rows and self.malformed > self.rows // 2:
            raise self._error()

    def add_empty(self, where: str) -> None:
        self.empty += 1
        self.examples.setdefault("empty document", where)

    def check(self) -> None:
        """Raise UserError when more than ``max_malformed`` of the rows were malformed."""
        if self.malformed > self.max_malformed * self.rows:
            raise self._error()

    def _error(self) -> MalformedError:
        return MalformedError(
            f"{self.malformed} of {self.rows} rows are malformed (at most "
            f"{self.max_malformed:.4g} of them may be): "
            f"{'; '.join(self.describe(with_empty=False))}; "
            "fix or remove them, set text_field to the field with the text, or raise "
            "max_malformed"
        )

    def merge(self, later: "Rejects") -> None:
        """Add rejects that come after all present ones."""
        self.rows += later.rows
        self.empty += later.empty
        self.counts.update(later.counts)
        self.examples = {**later.examples, **self.examples}

    def describe(self, *, with_empty: bool = True) -> list[str]:
        """Return one phrase per reason, most frequent first."""
        counts = self.counts.most_common()
        if with_empty and self.empty:
            counts.append(("empty document", self.empty))
        return [f"{n} x {reason} (first: {self.examples[reason]})" for reason, n in counts]


def group_units(sources: Sequence[Source], unit_bytes: int | None = None) -> list[Unit]:
    """Group consecutive sources until ``unit_bytes`` are reached; depends on nothing else.

    The default is 1/64 of the corpus, but between 16 and 64 MiB. A larger JSON lines or Parquet
    file is divided into parts of at most ``unit_bytes``, each its own unit; so is a stream.
    """
    if unit_bytes is None:
        total = sum(source.num_bytes for source in sources)
        unit_bytes = min(max(total // _UNITS, _MIN_UNIT_BYTES), UNIT_BYTES)
    groups: list[list[Source]] = []
    room = 0
    for source in (part for whole in sources for part in _parts(whole, unit_bytes)):
        if not groups or source.num_bytes > room or source.kind == "stream":
            groups.append([])
            room = unit_bytes
        groups[-1].append(source)
        room = 0 if source.num_parts > 1 or source.kind == "stream" else room - source.num_bytes
    return [Unit(index=i, sources=tuple(group)) for i, group in enumerate(groups)]


def _parts(source: Source, unit_bytes: int) -> list[Source]:
    num_parts = -(-source.num_bytes // unit_bytes)
    lines = source.kind == "jsonl" and source.name.endswith(".jsonl")  # not compressed
    if num_parts <= 1 or not (lines or source.kind == "parquet"):
        return [source]
    borders = [source.num_bytes * i // num_parts for i in range(num_parts + 1)]
    return [
        dataclasses.replace(
            source, part=i, num_parts=num_parts, first_byte=start, num_bytes=end - start
        )
        for i, (start, end) in enumerate(itertools.pairwise(borders))
    ]
