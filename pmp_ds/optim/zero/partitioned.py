"""What stages 1 to 3 have in common: a rank owns a partition of the model, in flats."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from pmp_ds.optim.zero.shards import Fragment, gradient_of, norm_over_ranks, pieces, slice_of


class Partitioned:
    """This rank's partition; the stages add the places that DeepSpeed keeps it in."""

    replicated = False
    norm_dtype: ClassVar[torch.dtype]
    """Of DeepSpeed's sum of squares over the ranks."""

    def __init__(
        self,
        zero: Any,
        flats: Sequence[torch.Tensor],
        fragments: Sequence[Fragment],
        groups: Sequence[int],
        *,
        offloaded: bool,
    ) -> None:
        self._zero, self._offloaded = zero, offloaded
        self.flats, self.groups = list(flats), list(groups)
        self.fragments = sorted(fragments, key=lambda f: (f.flat, f.flat_start))
        self._sizes = [sum(f.flat == i for f in fragments) for i in range(len(flats))]
        self._has_master = True
        self.device = torch.device("cpu" if offloaded else zero.device)
        self.clip_norm = float(zero.clip_grad)
        self.scales_loss = zero.dtype == torch.float16

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    def wait_for_gradients(self) -> None:
        """Wait until the gradients are in host memory, under offload; once between two steps."""
        raise NotImplementedError

    def gradients(self) -> list[torch.Tensor]:
        self.wait_for_gradients()
        if self._offloaded:
            flats = [[gradient_of(flat).view(-1)] for flat in self.flats]
        else:
            flats = [pieces(self._zero.averaged_gradients[i]) for i in range(len(self.flats))]
        return [slice_of(flats[f.flat], f.flat_start, f.numel) for f in self.fragments]

    def norm(self, squares: torch.Tensor) -> torch.Tensor:
        return norm_over_ranks(squares.to(self.device), self._sizes, self.norm_dtype)

    def replace_step(self, step: Any) -> None:
        self._zero.step = step

    def count(self, overflow: bool, norm: torch.Tensor) -> None:
        self._zero.overflow, self._zero._global_grad_norm = overflow, norm
        self._zero._update_scale(overflow)
