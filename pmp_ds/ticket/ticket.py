"""The ticket on disk: the mask and its origin. As secret as the mask.

FOLDER/mask.safetensors   packed bits per parameter (ticket/mask.py), uint8
FOLDER/ticket.json        format version, parameters, k, density, score, step, digests
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from pmp_ds import formats
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.foreign import MissingError, parse_object, read_bytes
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import atomic_path, make_private
from pmp_ds.tensor_file import encode, raw_bytes
from pmp_ds.ticket.mask import ParamMask, check_shapes, popcount
from pmp_ds.ticket.stored_bits import Facts, StoredBits

FORMAT_VERSION = formats.current("ticket")
MASK_FILE = "mask.safetensors"
MANIFEST_FILE = "ticket.json"
_MOST_MANIFEST = 1 << 28
# Exceptions from reading a damaged ticket.
_DAMAGE = (
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
)

MakeBits = Callable[[int], Mapping[str, torch.Tensor]]  # from the maximum bytes of the mask's file


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a mask comes from. ``model_digest`` covers the parameters it fits, not their values."""

    density: float
    source: str  # earlybird, random
    score: str | None
    step: int | None  # update of discovery that drew it, from 1
    stable: bool
    model_digest: str

    def __post_init__(self) -> None:
        """Check the fields, as a stranger's ticket may contain anything; UserError names one."""
        numbers = (int, float)
        for name, value, ok in (
            ("density", self.density, type(self.density) in numbers and 0 <= self.density <= 1),
            ("source", self.source, isinstance(self.source, str)),
            ("score", self.score, self.score is None or isinstance(self.score, str)),
            ("step", self.step, self.step is None or (type(self.step) is int and self.step > 0)),
            ("stable", self.stable, isinstance(self.stable, bool)),
            ("model_digest", self.model_digest, isinstance(self.model_digest, str)),
        ):
            require(ok, f"{name} is {value!r:.80}")


@dataclass(frozen=True, kw_only=True)
class Ticket(Origin):
    """A mask and its origin."""

    mask: ParamMask

    @cached_property
    def id(self) -> str:
        """The sha256 over the parameters' names, shapes and bits."""
        tally = _Tally()
        for name, shape in self.mask.shapes.items():
            tally.begin(name, shape)
            for piece in self.mask.pieces(name):
                tally.add(piece)
        return tally.digest.hexdigest()


class _Tally:
    """The id of a ticket and its number of ones, of bits that pass by in the order of elements."""

    def __init__(self) -> None:
        self.digest, self.num_kept = hashlib.sha256(b"pmp-ds ticket\n"), 0

    def begin(self, name: str, shape: tuple[int, ...]) -> None:
        self.digest.update(f"{name}{list(shape)}\n".encode())

    def add(self, bits: torch.Tensor) -> None:
        self.digest.update(raw_bytes(bits))
        self.num_kept += popcount(bits)


def _encoded(
    origin: Origin, shapes: Mapping[str, tuple[int, ...]], parts: Iterator[torch.Tensor]
) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
    """Yield name and content of the files of a ticket, the manifest last. ``parts`` are the packed
    bits of each parameter in the order of ``shapes``; equal tickets give equal bytes."""
    tally = _Tally()

    def next_part(name: str) -> torch.Tensor:
        bits = next(parts)
        tally.begin(name, shapes[name])
        tally.add(bits)
        return bits

    packed = {name: ((math.prod(shape) + 7) // 8,) for name, shape in shapes.items()}
    yield MASK_FILE, encode(packed, dict.fromkeys(shapes, torch.uint8), next_part)
    manifest = {field.name: getattr(origin, field.name) for field in fields(Origin)} | {
        "format_version": FORMAT_VERSION,
        "id": tally.digest.hexdigest(),
        "num_kept": tally.num_kept,
        "num_params": sum(math.prod(shape) for shape in shapes.values()),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
    }
    # Unsorted: the order of the parameters is the global element order.
    yield MANIFEST_FILE, iter([(json.dumps(manifest, indent=1) + "\n").encode()])


def to_files(ticket: Ticket) -> dict[str, bytes]:
    """Return the ticket's files by name, the same bytes for equal tickets; the manifest is last."""
    mask = ticket.mask
    parts = (mask.bits[name] for name in mask.shapes)
    return {name: b"".join(content) for name, content in _encoded(ticket, mask.shapes, parts)}


def save_ticket(ticket: Ticket, folder: Path) -> None:
    """Write ``folder`` (0700, files 0600); the manifest, written last, makes it complete."""
    mask = ticket.mask
    save_parts(ticket, mask.shapes, (mask.bits[name] for name in mask.shapes), folder)


def save_parts(
    origin: Origin,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterator[torch.Tensor],
    folder: Path,
) -> None:
    """Do the same as ``save_ticket`` with the packed bits of one parameter in memory."""
    make_private(folder)
    for name, content in _encoded(origin, shapes, parts):
        with atomic_path(folder / name, private=True) as path, open(path, "wb") as file:
            for piece in content:
                file.write(piece)


def has_ticket(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists()


def load_ticket(folder: Path, *, model_digest: str | None = None) -> Ticket:
    """Read and check a ticket, whose bits stay in the file. Raises UserError when it is missing,
    damaged, of an unknown format, or does not match ``model_digest``."""
    return _at(folder, model_digest, lambda most: StoredBits(folder / MASK_FILE, most))


def open_ticket(folder: Path, ticket_id: str, facts: Facts, model_digest: str | None) -> Ticket:
    """Open a ticket of which another rank has read and checked every bit: ``ticket_id`` and
    ``facts``. Raises UserError as ``load_ticket``, also where this is another one."""
    bits = partial(StoredBits, folder / MASK_FILE, facts=facts)
    return _at(folder, model_digest, bits, ticket_id)


def _at(
    folder: Path, model_digest: str | None, bits: MakeBits, known_id: str | None = None
) -> Ticket:
    try:
        manifest = partial(read_bytes, folder / MANIFEST_FILE, _MOST_MANIFEST)
        ticket = _checked(manifest, bits, folder, known_id)
    except MissingError as error:
        raise UserError(f"no ticket at {folder}: {error}") from None
    if model_digest is not None and ticket.model_digest != model_digest:
        raise UserError(
            f"the ticket at {folder} belongs to a model with other parameters: their names or "
            "shapes differ from those of the configured model"
        )
    return ticket


def from_files(read: Callable[[str, int], bytes], where: Path) -> Ticket:
    """Return the ticket whose files ``read`` returns, given a name and a maximum size. Raises
    UserError, with ``where``, when they are damaged or of an unknown format."""
    manifest = partial(read, MANIFEST_FILE, _MOST_MANIFEST)
    return _checked(manifest, lambda most: load(read(MASK_FILE, most)), where)


def _checked(
    content: Callable[[], bytes], bits: MakeBits, where: Path, known_id: str | None = None
) -> Ticket:
    """Return the ticket of a manifest's ``content``. With ``known_id`` its bits are not read."""
    try:
        manifest = _manifest(content())
        formats.require("ticket", where, manifest["format_version"], way_out="use that version")
        shapes = fit(dict[str, tuple[int, ...]], manifest["parameters"], "parameters")
        ticket = Ticket(
            mask=ParamMask(bits=bits(_most_bytes(shapes)), shapes=shapes),
            **{field.name: manifest[field.name] for field in fields(Origin)},
        )
        if known_id is not None:
            vars(ticket)["id"] = known_id  # where cached_property keeps it
        intact = ticket.id == manifest["id"]  # reads every bit, and counts the ones
        intact = intact and manifest["num_params"] == ticket.mask.num_params
        if known_id is None:
            intact = intact and manifest["num_kept"] == ticket.mask.num_kept
    except (FormatError, MissingError):
        raise
    except UserError as error:
        raise UserError(f"the ticket at {where} is damaged: {error}") from None
    except _DAMAGE as error:
        raise UserError(f"the ticket at {where} is damaged ({type(error).__name__})") from None
    if not intact:
        raise UserError(f"the ticket at {where} is damaged: its bits do not match its id")
    return ticket


def _manifest(content: bytes) -> dict[str, Any]:
    try:
        return parse_object(content)
    except ValueError as error:
        raise UserError(f"{MANIFEST_FILE}: {error}") from None


def _most_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the maximum size of a mask file for parameters of these ``shapes``: bits and a header.
    Raises UserError when they do not fit a model."""
    check_shapes(shapes)
    bits = sum(math.prod(shape) // 8 + 1 for shape in shapes.values())
    return bits + sum(len(name.encode()) + 256 for name in shapes) + 4096


def exact_k(density: float, num_params: int) -> int:
    """Return k = floor(density * d), at least 1 (paper, Eq. 1), of the decimal the user wrote."""
    return max(1, int(Fraction(repr(density)) * num_params))
