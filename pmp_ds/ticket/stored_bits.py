"""The packed bits of a mask file, read where they are needed.

The first reading of a parameter counts the ones of every chunk and takes its digest. Whoever is
given these facts reads only the chunks that it needs, and knows that they are the same.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from pmp_ds.errors import UserError
from pmp_ds.foreign import ForeignError, MissingError, require_regular
from pmp_ds.tensor_file import DTYPES, TensorFile, raw_bytes
from pmp_ds.ticket.mask import Bits, popcount

CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class Facts:
    """What is known of the chunks of every parameter that was read whole."""

    ones: dict[str, list[int]] = field(default_factory=dict)
    """The number of ones in each chunk."""
    digests: dict[str, list[bytes]] = field(default_factory=dict)


class StoredBits(Bits):
    """The bits in a file. Raises ForeignError if it is missing or longer than ``most`` bytes, and
    UserError when it ends early or is not what ``facts`` say."""

    def __init__(self, path: Path, most: int, facts: Facts | None = None) -> None:
        require_regular(path, most)
        try:
            self._file = TensorFile(path)
        except FileNotFoundError:
            raise MissingError(f"{path} is missing") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise ForeignError(f"{path.name} cannot be read ({type(error).__name__})") from None
        self.facts = facts or Facts()
        self._read: dict[tuple[str, int], torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.names)

    def __len__(self) -> int:
        return len(self._file.names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._file.names:
            raise KeyError(name)
        return torch.cat([*self.pieces(name), torch.empty(0, dtype=torch.uint8)])

    def form(self, name: str) -> tuple[torch.dtype | str, tuple[int, ...]]:
        dtype = self._file.dtype(name)
        return DTYPES.get(dtype, dtype), self._file.shape(name)

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        low = first // CHUNK
        chunks = [self._kept(name, i) for i in range(low, -(-last // CHUNK))]
        joined = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
        return joined[first - low * CHUNK :][: last - first]

    def num_ones(self, name: str, last: int) -> int:
        if name not in self.facts.ones:
            for _ in self.pieces(name):
                pass
        if last == self._length(name):
            return sum(self.facts.ones[name])
        whole = last // CHUNK
        rest = self.part(name, whole * CHUNK, last)
        return sum(self.facts.ones[name][:whole]) + popcount(rest)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        ones, digests = [], []
        for i in range(-(-self._length(name) // CHUNK)):
            chunk = self._chunk(name, i)
            ones.append(popcount(chunk))
            digests.append(_digest(chunk))
            yield chunk
        self.facts.ones[name], self.facts.digests[name] = ones, digests

    def _length(self, name: str) -> int:
        return int(torch.Size(self._file.shape(name)).numel())

    def _kept(self, name: str, number: int) -> torch.Tensor:
        """Return a chunk that is read once: a rank that has read its fragments no longer depends on
        the file."""
        if (name, number) not in self._read:
            self._read[name, number] = self._chunk(name, number)
        return self._read[name, number]

    def _chunk(self, name: str, number: int) -> torch.Tensor:
        start = number * CHUNK
        try:
            chunk = self._file.part(name, start, min(CHUNK, self._length(name) - start))
        except OSError as error:
            raise UserError(f"{self._file.path} cannot be read: {error}") from None
        known = self.facts.digests.get(name)
        if known is not None and known[number] != _digest(chunk):
            raise UserError(
                f"{self._file.path} is not the file that rank 0 read at the start: restore it, or "
                "let all machines see the same folder"
            )
        return chunk


def _digest(chunk: torch.Tensor) -> bytes:
    return hashlib.sha256(raw_bytes(chunk)).digest()
