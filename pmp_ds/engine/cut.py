"""Divide the sequences of an update into a share per rank, and each share into micro-batches.

Apart from rounding, training does not depend on this, so it may change at every start of a run.
"""

from dataclasses import dataclass

import torch

from pmp_ds.config import TrainConfig
from pmp_ds.errors import require


@dataclass(frozen=True)
class Cut:
    """A division into ``accumulation_steps`` micro-batches of ``micro_batch_size`` rows on each of
    ``world_size`` ranks. ZeRO's collectives need equal numbers and shapes on all ranks, so a rank
    whose share has fewer rows repeats its last one with weight 0."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int
    accumulation_steps: int
    limit: int
    """``train.micro_batch_size``, the largest micro-batch that the settings allow; with `auto`,
    until it is a number, the whole share."""

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> "Cut":
        """Return the cut with the fewest accumulation steps. Raises UserError when a rank would
        have no sequence."""
        size = config.global_batch_size
        require(
            world_size <= size,
            f"train.global_batch_size={size} is less than one sequence for each of {world_size} "
            f"ranks: start at most {size} ranks, or begin another run with larger batches",
        )
        share = -(-size // world_size)
        limit = share if config.micro_batch_size == "auto" else config.micro_batch_size
        steps = -(-share // limit)
        return cls(size, world_size, -(-share // steps), steps, limit)

    @property
    def rows(self) -> int:
        """Rows that each rank computes per update, including repeated ones."""
        return self.micro_batch_size * self.accumulation_steps

    @property
    def repeated(self) -> int:
        """Repeated rows per update, over all ranks."""
        return self.rows * self.world_size - self.global_batch_size

    def fill(self, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ``rows`` that a rank computes for its share, (n, T), and their weights,
        (rows,) fp32. The mean of the weighted losses, over the rows and then over the ranks, is the
        mean of the unweighted ones over the global batch. Without repeated rows every weight is
        exactly 1."""
        n = len(share)
        assert 0 < n <= self.rows
        weights = torch.zeros(self.rows, device=share.device)
        weights[:n] = self.rows * self.world_size / self.global_batch_size
        if n < self.rows:
            last = share[-1:].expand(self.rows - n, *share.shape[1:])
            share = torch.cat([share, last])
        return share, weights

    def in_words(self) -> str:
        """Return the arithmetic in one line, without ``unused``."""
        steps = _count(self.accumulation_steps, "accumulation step")
        return (
            f"{self.micro_batch_size} sequences x {steps} x {_count(self.world_size, 'rank')}"
            + (f" - {self.repeated} repeated with weight 0" if self.repeated else "")
            + f" = {self.global_batch_size} sequences"
        )

    @property
    def unused(self) -> str:
        """The reason why micro-batches are smaller than the settings allow, or an empty string."""
        if self.micro_batch_size == self.limit:
            return ""
        share = -(-self.global_batch_size // self.world_size)
        why = "is more than" if self.limit > share else "does not divide"
        return f" (train.micro_batch_size={self.limit} {why} a rank's share of {share})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"
