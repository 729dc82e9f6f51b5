"""A ticket among ranks: each holds, writes and reads only its own share of the mask."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.ticket.mask import ParamMask, pack, unpack
from pmp_ds.ticket.stored_bits import Facts, StoredBits
from pmp_ds.ticket.ticket import Origin, Ticket, load_ticket, open_ticket, save_parts

_CHUNK = 1 << 26  # elements gathered at once; a multiple of 8


@dataclass(frozen=True)
class Piece:
    """This rank's packed bits of elements [start, start + numel) of a parameter."""

    name: str
    start: int
    numel: int
    bits: torch.Tensor


@dataclass(frozen=True)
class SharedTicket:
    """A ticket of which every rank holds its own pieces; ``replicated``: every rank holds all."""

    origin: Origin
    shapes: Mapping[str, tuple[int, ...]]
    pieces: Sequence[Piece]
    device: torch.device
    replicated: bool = False

    def save(self, folder: Path) -> None:
        """Write the ticket with one parameter's bits in memory. Collective. Raises UserError."""
        parts, problem = self.parts(), None
        if dist.rank() == 0:
            try:
                save_parts(self.origin, self.shapes, parts, folder)
            except OSError as error:
                problem = f"{folder} cannot be written: {error}"
        for _ in parts:  # the other ranks take part in it, also when writing fails
            pass
        if (problem := dist.broadcast_object(problem)) is not None:
            raise UserError(problem)

    def gathered(self) -> Ticket:
        """Return the whole ticket, on every rank. Collective."""
        bits = dict(zip(self.shapes, self.parts(), strict=True))
        return Ticket(mask=ParamMask(bits=bits, shapes=self.shapes), **vars(self.origin))

    def parts(self) -> Iterator[torch.Tensor]:
        """Yield each parameter's packed bits, on CPU. Collective, to the end."""
        of = defaultdict(list)
        for piece in self.pieces:
            of[piece.name].append(piece)
        for name, shape in self.shapes.items():
            numel = torch.Size(shape).numel()
            chunks = [
                self._chunk(of[name], start, min(_CHUNK, numel - start))
                for start in range(0, numel, _CHUNK)
            ]
            yield torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)

    def _chunk(self, pieces: list[Piece], start: int, numel: int) -> torch.Tensor:
        kept = torch.zeros(numel, dtype=torch.bool, device=self.device)
        for piece in pieces:
            low = max(start, piece.start)
            high = min(start + numel, piece.start + piece.numel)
            if low < high:
                own = unpack(piece.bits, high - low, low - piece.start)
                kept[low - start : high - start] = own.to(self.device)
        packed = pack(kept)
        if not self.replicated:  # each bit is set on one rank at most: the sum has no carry
            dist.all_reduce_sum(packed)
        return packed.cpu()


def load_together(folder: Path, *, model_digest: str | None = None) -> Ticket:
    """Return a ticket of which rank 0 has read and checked every bit.

    The other ranks read what they need, and find out if it is not the same. Collective. Raises
    UserError as ``load_ticket`` does.
    """
    first: list[Ticket] = []

    def read() -> tuple[str, Facts]:
        first.append(load_ticket(folder, model_digest=model_digest))
        bits = first[0].mask.bits
        assert isinstance(bits, StoredBits)
        return first[0].id, bits.facts

    ticket_id, facts = dist.on_rank0(read)
    return dist.together(
        lambda: first[0] if first else open_ticket(folder, ticket_id, facts, model_digest)
    )
