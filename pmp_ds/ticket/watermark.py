"""Mark a copy of a ticket, so that the copy, or a model trained with it, identifies its holder.

A copy lacks some of the ticket's elements. The candidates are drawn from a key of the run; the
missing ones among them are the recipient's codeword, in a binary fingerprinting code (G. Tardos,
Optimal probabilistic fingerprint codes, J. ACM 55, 2008): each place has its own probability of
being absent from any recipient's copy. Recipients who compare their copies see some of the places,
but whatever they make of them is closer to their own codewords than to any other.

Parameters that the ticket keeps whole (norms, biases) stay whole, because a single frozen norm
element would be noticeable.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from pmp_ds.errors import UserError
from pmp_ds.model.stream import uniforms
from pmp_ds.ticket.mask import ParamMask, popcount
from pmp_ds.ticket.ticket import Ticket

SHARE = 0.002
"""Kept elements per place of the code; a copy lacks half of the places on average."""

FEWEST = 2048
"""Places of the code in a small ticket, if it has four times as many elements to mark."""

LEAST = 128
"""Minimum number of places; with fewer a copy would identify nobody."""

CUTOFF = 0.005
"""Smallest probability of a place; the largest is 1 minus this."""

_CHUNK = 1 << 22  # elements processed at once: 32 MiB of indices


@dataclass(frozen=True)
class Code:
    """The places that copies may lack, the same for all recipients of a run's ticket."""

    places: Mapping[str, torch.Tensor]
    """Places in each flattened parameter, in the mask's order: (n,) int64, ascending."""

    chances: torch.Tensor
    """(m,) float64: each place's probability of absence, over all parameters in order."""

    def __len__(self) -> int:
        return len(self.chances)


def markable(mask: ParamMask) -> dict[str, int]:
    """Return the number of kept elements of each parameter not kept whole, in the mask's order."""
    kept = {name: popcount(bits) for name, bits in mask.bits.items()}
    return {name: kept[name] for name in mask.shapes if kept[name] < mask.numel(name)}


def length(mask: ParamMask) -> int:
    """Return the number of places in the code of ``mask``."""
    return min(max(round(SHARE * mask.num_kept), FEWEST), sum(markable(mask).values()) // 4)


def draw_code(mask: ParamMask, key: bytes) -> Code:
    """Draw ``length`` kept elements of ``mask``, uniformly without repetition, from ``key`` (32
    bytes), with probabilities by Tardos' arcsine law. Raises UserError for a ticket that is too
    small or too full."""
    kept = markable(mask)
    total, count = sum(kept.values()), length(mask)
    if count < LEAST:
        raise UserError(
            f"a ticket of {mask.num_kept} elements, {total} of them in partly trained parameters, "
            f"is too small for a watermark of {LEAST} places: pass --no-watermark"
        )
    ranks = torch.from_numpy(_draw(key, count, total))
    places, first = {}, 0
    for name, num_kept in kept.items():
        places[name] = _elements(mask, name, _between(ranks, first, num_kept))
        first += num_kept
    low = math.asin(math.sqrt(CUTOFF))
    angles = low + (math.pi / 2 - 2 * low) * uniforms(key, 8 * count, count)  # after the places
    return Code(places, torch.from_numpy(np.sin(angles) ** 2))


def codeword(code: Code, key: bytes) -> torch.Tensor:
    """Return the places missing from the copy for the holder of ``key`` (32 bytes), (m,) bool."""
    return torch.from_numpy(uniforms(key, 0, len(code))) < code.chances


def without(ticket: Ticket, code: Code, word: torch.Tensor) -> Ticket:
    """Return ``ticket`` without the places of a codeword."""
    bits = dict(ticket.mask.bits)
    words = word.split([len(places) for places in code.places.values()])
    for (name, places), lacks in zip(code.places.items(), words, strict=True):
        packed, where = bits[name].numpy().copy(), places[lacks].numpy()
        np.bitwise_and.at(packed, where // 8, ~(1 << where % 8).astype(np.uint8))
        bits[name] = torch.from_numpy(packed)
    return replace(ticket, mask=ParamMask(bits=bits, shapes=ticket.mask.shapes))


def _draw(key: bytes, count: int, total: int) -> NDArray[np.int64]:
    """Return ``count`` distinct numbers below ``total`` (>= 2 x count), ascending. They are the
    first distinct ones of a ChaCha20 stream of 64-bit numbers, with a bias below total / 2^64."""
    length = 2 * count + 64
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    numbers = np.frombuffer(stream.update(bytes(8 * length)), dtype="<u8") % np.uint64(total)
    _, first = np.unique(numbers, return_index=True)
    chosen = numbers[np.sort(first)[:count]].astype(np.int64)
    assert len(chosen) == count
    return np.sort(chosen)


def _elements(mask: ParamMask, name: str, ranks: torch.Tensor) -> torch.Tensor:
    """Return the places in parameter ``name`` of its kept elements number ``ranks``, from 0."""
    found, before, numel = [], 0, mask.numel(name)
    for start in range(0, numel, _CHUNK):
        kept = mask.fragment(name, start, min(_CHUNK, numel - start)).nonzero().view(-1)
        found.append(start + kept[_between(ranks, before, len(kept))])
        before += len(kept)
    return torch.cat(found) if found else ranks


def _between(ranks: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return those in [first, first + count), counted from ``first``."""
    low, high = torch.searchsorted(ranks, torch.tensor([first, first + count]))
    return ranks[low:high] - first


def missing_from(copy: Ticket, original: Ticket, where: Path) -> int:
    """Return how many elements of ``original`` the copy at ``where`` lacks. Raises UserError unless
    it is a copy: same model, nothing added, and no more missing than a watermark may remove."""
    if copy.mask.shapes != original.mask.shapes:
        raise UserError(f"{where} is not a copy of the run's ticket: it is for another model")
    common = sum(popcount(bits & original.mask.bits[name]) for name, bits in copy.mask.bits.items())
    missing = original.mask.num_kept - common
    if common != copy.mask.num_kept or missing > 0.6 * length(original.mask):
        raise UserError(f"{where} is not a copy of the run's ticket: it keeps other elements")
    return missing
