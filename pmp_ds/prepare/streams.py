"""Hugging Face datasets in streaming mode, cut into work units as they arrive.

A single process reads a stream: the parent spools about 64 MiB of text at a time into files, which
the workers pack like any others and then delete. A repeated run reads the stream again, and skips
units whose text is the same to the byte.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import (
    STREAM,
    UNIT_BYTES,
    Rejects,
    Source,
    StreamOptions,
    Unfinished,
    Unit,
)
from pmp_ds.prepare.rows import parse_row


def read_stream(
    source: Source, text_field: str, rejects: Rejects, *, shuffle: bool = True
) -> Iterator[str]:
    """Yield the documents of a stream as they arrive.

    Raises UserError when it cannot be opened, and ``Unfinished`` when it breaks off.
    """
    options = source.stream or StreamOptions()
    rows = iter(_open(source, options, options.shuffle_buffer if shuffle else 0))
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # loader, network and format raise anything
            raise Unfinished(
                f"input {source.name} broke off after {number} rows: {_reason(error)}; run the "
                "same command again, finished parts are kept"
            ) from error
        if row is None:
            return
        number += 1
        rejects.rows += 1
        text, reason = parse_row(row, text_field)
        if text is None:
            rejects.add(reason, f"{source.name}:{number}")
        elif text.strip():
            yield text
        else:
            rejects.add_empty(f"{source.name}:{number}")


def spooled(
    units: Iterable[Unit], folder: Path, text_field: str, rejects: Rejects
) -> Iterator[Unit]:
    """Yield the units, numbered anew, with a stream replaced by its units as they arrive, as files
    in ``folder``. The stream's bad rows are counted in ``rejects``."""
    index = 0
    for unit in units:
        parts: Iterable[Unit] = [dataclasses.replace(unit, index=index)]
        if unit.sources[0].kind == "stream":
            parts = spool_units(unit.sources[0], index, folder, text_field, rejects)
        for part in parts:
            yield part
            index += 1


def spool_units(
    source: Source,
    first_index: int,
    folder: Path,
    text_field: str,
    rejects: Rejects,
    unit_bytes: int = UNIT_BYTES,
) -> Iterator[Unit]:
    """Yield units of about ``unit_bytes`` of text, numbered from ``first_index``, as files in
    ``folder``; the process that packs one deletes it and counts its rows. Rejected rows are counted
    here.
    """
    index, size = first_index, 0
    lines: list[bytes] = []
    for text in read_stream(source, text_field, rejects):
        rejects.rows -= 1  # the worker that reads the spooled file counts it
        line = json.dumps({text_field: text}, ensure_ascii=False).encode()
        lines.append(line)
        size += len(line)
        if size >= unit_bytes:
            yield _spool(source, index, folder, lines)
            index, size, lines = index + 1, 0, []
    if lines:
        yield _spool(source, index, folder, lines)


def _spool(source: Source, index: int, folder: Path, lines: list[bytes]) -> Unit:
    path = folder / f"{index:05d}.jsonl"
    data = b"\n".join(lines)
    path.write_bytes(data)
    part = dataclasses.replace(
        source, name=f"{source.name}[{index}]", path=path, kind="jsonl", num_bytes=len(data)
    )
    return Unit(index=index, sources=(part,), digest=hashlib.sha256(data).hexdigest(), spooled=True)


def _open(source: Source, options: StreamOptions, buffer: int) -> Any:
    import datasets

    name = source.name.removeprefix(STREAM)
    try:
        rows = datasets.load_dataset(
            name,
            options.config,
            split=options.split,
            revision=options.revision,
            streaming=True,
        )
        return rows.shuffle(seed=options.seed, buffer_size=buffer) if buffer else rows
    except Exception as error:  # the loader has no common exception
        raise UserError(
            f"input {source.name} cannot be opened (hf_split={options.split!r}, "
            f"hf_config={options.config!r}): {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)
