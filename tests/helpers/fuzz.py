"""Feed altered bytes to the parsers of untrusted files.

    make fuzz                                             ten minutes; needs the extra `fuzz`
    python -m tests.helpers.fuzz -max_total_time=60       libFuzzer's own options

atheris changes the bytes to reach new branches of our code. The first byte selects the parser. An
undocumented exception ends the run and leaves the input in a file.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pyarrow as pa
import yaml
from safetensors import SafetensorError
from safetensors.torch import load

from pmp_ds import foreign, strict_yaml
from pmp_ds.data import arrow_header
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.operate import backup_file
from pmp_ds.prepare import jsonl
from pmp_ds.release.ledger import Entry
from pmp_ds.ticket import archive, vault

NOWHERE = Path("x")


def _json(data: bytes) -> object:
    return fit(Entry, foreign.parse(data), NOWHERE)


def _yaml(data: bytes) -> object:
    return strict_yaml.parse(data.decode("utf-8"))


PARSERS: dict[str, tuple[Callable[[bytes], object], tuple[type[Exception], ...]]] = {
    "json": (_json, (ValueError,)),
    "yaml": (_yaml, (yaml.YAMLError, UnicodeDecodeError)),
    "rows": (lambda data: jsonl.parse_chunk(data + b"\n", "text"), ()),
    "line": (lambda data: jsonl._parse_line(data, "text"), ()),
    "batch": (arrow_header.is_packed, (pa.ArrowInvalid,)),
    "archive": (lambda data: vault._members(data, NOWHERE), (UserError,)),
    "backup": (lambda data: backup_file.read_archive(data, NOWHERE), (UserError,)),
    "tensors": (load, (SafetensorError,)),
}
"""The reader of the bytes, and the exceptions it may raise."""


def one(data: bytes) -> None:
    """Pass ``data`` to the parser selected by its first byte."""
    parse, promised = list(PARSERS.values())[data[0] % len(PARSERS) if data else 0]
    with contextlib.suppress(*promised):
        parse(data[1:])


def main() -> None:
    import atheris

    for module in (foreign, strict_yaml, jsonl, arrow_header, archive, backup_file, vault):
        for function in vars(module).values():
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
