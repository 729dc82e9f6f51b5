"""The ticket on disk: the mask and its origin. As secret as the mask.

FOLDER/mask.safetensors   packed bits per parameter (ticket/mask.py), uint8
FOLDER/ticket.json        format version, parameters, k, density, score, step, digests
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from pmp_ds import formats
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.foreign import MissingError, parse_object, read_bytes
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import make_private, write_bytes
from pmp_ds.ticket.mask import ParamMask, check_shapes

FORMAT_VERSION = formats.current("ticket")
MASK_FILE = "mask.safetensors"
MANIFEST_FILE = "ticket.json"
_MOST_MANIFEST = 1 << 28
_ORIGIN = ("density", "source", "score", "step", "stable", "model_digest")
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


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A mask and its origin. ``model_digest`` covers the parameters it fits, not their values."""

    mask: ParamMask
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

    @cached_property
    def id(self) -> str:
        """The sha256 over the parameters' names, shapes and bits."""
        digest = hashlib.sha256(b"pmp-ds ticket\n")
        for name, shape in self.mask.shapes.items():
            digest.update(f"{name}{list(shape)}\n".encode())
            digest.update(self.mask.bits[name].numpy().tobytes())
        return digest.hexdigest()


def to_files(ticket: Ticket) -> dict[str, bytes]:
    """Return the ticket's files by name, the same bytes for equal tickets; the manifest is last."""
    manifest = {name: getattr(ticket, name) for name in _ORIGIN} | {
        "format_version": FORMAT_VERSION,
        "id": ticket.id,
        "num_kept": ticket.mask.num_kept,
        "num_params": ticket.mask.num_params,
        "parameters": {name: list(shape) for name, shape in ticket.mask.shapes.items()},
    }
    # Unsorted: the order of the parameters is the global element order.
    text = json.dumps(manifest, indent=1) + "\n"
    return {MASK_FILE: save(dict(ticket.mask.bits)), MANIFEST_FILE: text.encode()}


def save_ticket(ticket: Ticket, folder: Path) -> None:
    """Write ``folder`` (0700, files 0600); the manifest, written last, makes it complete."""
    make_private(folder)
    for name, content in to_files(ticket).items():
        write_bytes(folder / name, content, private=True)


def has_ticket(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists()


def load_ticket(folder: Path, *, model_digest: str | None = None) -> Ticket:
    """Read and check a ticket. Raises UserError when it is missing, damaged, of an unknown format,
    or does not match ``model_digest``."""
    try:
        ticket = from_files(lambda name, most: read_bytes(folder / name, most), folder)
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
    try:
        manifest = _manifest(read(MANIFEST_FILE, _MOST_MANIFEST))
        formats.require("ticket", where, manifest["format_version"], way_out="use that version")
        shapes = fit(dict[str, tuple[int, ...]], manifest["parameters"], "parameters")
        ticket = Ticket(
            mask=ParamMask(bits=load(read(MASK_FILE, _most_bytes(shapes))), shapes=shapes),
            **{name: manifest[name] for name in _ORIGIN},
        )
        counts = (ticket.mask.num_kept, ticket.mask.num_params)
        intact = ticket.id == manifest["id"]
        intact = intact and counts == (manifest["num_kept"], manifest["num_params"])
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
