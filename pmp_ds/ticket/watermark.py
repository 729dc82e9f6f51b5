"""Marks a copy of a ticket, so that the copy or a model trained with it names its holder.

A copy lacks 0.1% of the ticket's elements, drawn from a key of the recipient's own. Parameters
that the ticket keeps whole (norms, biases) are left whole: one frozen norm element would show.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, popcount
from pmp_ds.ticket.ticket import Ticket

SHARE = Fraction(1, 1000)
_CHUNK = 1 << 22  # elements looked at together: 32 MiB of indices

Marks = Mapping[str, torch.Tensor]
"""Dropped elements by parameter: (n,) int64, ascending places in the flattened parameter."""


def markable(mask: ParamMask) -> dict[str, int]:
    """Kept elements of each parameter that is not kept whole, in the mask's order."""
    kept = {name: popcount(bits) for name, bits in mask.bits.items()}
    return {name: kept[name] for name in mask.shapes if kept[name] < mask.numel(name)}


def draw_marks(mask: ParamMask, key: bytes) -> Marks:
    """round(0.001 k) kept elements of ``mask``, uniformly without repetition from ``key`` (32
    bytes). Raises UserError for a ticket too small or too full to be marked."""
    kept = markable(mask)
    total, count = sum(kept.values()), round(SHARE * mask.num_kept)
    if not 0 < 2 * count <= total:
        raise UserError(
            f"a ticket of {mask.num_kept} elements, {total} of them in parameters that are trained "
            f"in part, cannot carry a watermark of {count}: pass --no-watermark"
        )
    ranks = torch.from_numpy(_draw(key, count, total))
    marks, first = {}, 0
    for name, num_kept in kept.items():
        marks[name] = _elements(mask, name, _between(ranks, first, num_kept))
        first += num_kept
    return marks


def without(ticket: Ticket, marks: Marks) -> Ticket:
    """``ticket`` less the marked elements."""
    bits = dict(ticket.mask.bits)
    for name, elements in marks.items():
        packed, where = bits[name].numpy().copy(), elements.numpy()
        np.bitwise_and.at(packed, where // 8, ~(1 << where % 8).astype(np.uint8))
        bits[name] = torch.from_numpy(packed)
    return replace(ticket, mask=ParamMask(bits=bits, shapes=ticket.mask.shapes))


def _draw(key: bytes, count: int, total: int) -> NDArray[np.int64]:
    """``count`` distinct numbers below ``total``, at least twice as many; ascending. The first
    distinct ones of a ChaCha20 stream of 64-bit numbers, so the bias is below total / 2^64."""
    length = 2 * count + 64
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    numbers = np.frombuffer(stream.update(bytes(8 * length)), dtype="<u8") % np.uint64(total)
    _, first = np.unique(numbers, return_index=True)
    chosen = numbers[np.sort(first)[:count]].astype(np.int64)
    assert len(chosen) == count
    return np.sort(chosen)


def _elements(mask: ParamMask, name: str, ranks: torch.Tensor) -> torch.Tensor:
    """Places in parameter ``name`` of its kept elements number ``ranks``, from 0."""
    found, before, numel = [], 0, mask.numel(name)
    for start in range(0, numel, _CHUNK):
        kept = mask.fragment(name, start, min(_CHUNK, numel - start)).nonzero().view(-1)
        found.append(start + kept[_between(ranks, before, len(kept))])
        before += len(kept)
    return torch.cat(found) if found else ranks


def _between(ranks: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Those in [first, first + count), counted from ``first``."""
    low, high = torch.searchsorted(ranks, torch.tensor([first, first + count]))
    return ranks[low:high] - first


def missing_from(copy: Ticket, original: Ticket, where: Path) -> int:
    """How many elements of ``original`` the copy at ``where`` lacks. Raises UserError unless it is
    a copy: of the same model, with nothing added and no more missing than a watermark."""
    if copy.mask.shapes != original.mask.shapes:
        raise UserError(f"{where} is no copy of the run's ticket: it is for another model")
    common = sum(
        popcount(bits & original.mask.bits[name]) for name, bits in copy.mask.bits.items()
    )
    missing = original.mask.num_kept - common
    if common != copy.mask.num_kept or missing > round(SHARE * original.mask.num_kept):
        raise UserError(f"{where} is no copy of the run's ticket: it keeps other elements")
    return missing
