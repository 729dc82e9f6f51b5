"""One update of a masked optimizer: the norm of its gradients, and the step itself.

The operators of kernels/ need one launch for each and never wait for the device. Where there are
none, torch operations make the same step to the bit, chunk by chunk; their norm differs in the
order in which fp64 squares are added.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from pmp_ds.optim.kernels import Kernels, can_read
from pmp_ds.optim.kernels.batch import Batch, Coefficients, Layout, Segment, Tensors
from pmp_ds.optim.low_bit import join, split
from pmp_ds.optim.stored import CHUNK, Stored
from pmp_ds.ticket.mask import unpack

if TYPE_CHECKING:
    from pmp_ds.optim.masked import MaskedOptimizer


class Update:
    """An update that is about to be made; ``MaskedOptimizer.update`` prepares it."""

    def __init__(
        self,
        optimizer: "MaskedOptimizer",
        segments: Sequence[Segment],
        tensors: Sequence[Tensors],
        kernels: tuple[Kernels, Layout] | None,
    ) -> None:
        self._optimizer, self._segments, self._tensors = optimizer, segments, tensors
        self._operators: tuple[Kernels, Batch] | None = None
        if kernels is not None and can_read(kernels[0], tensors):
            batch = Batch(
                kernels[1], tensors, master=optimizer.master, moments=optimizer.moment_format
            )
            self._operators = kernels[0], batch

    def squares(self) -> torch.Tensor:
        """Return the sum of squares of the kept gradients of each segment, (num_segments,) fp64."""
        if self._operators is not None:
            kernels, batch = self._operators
            return kernels.sums_of_squares(batch)
        device = self._tensors[0].master.device if self._tensors else None
        sums = torch.zeros(len(self._tensors), dtype=torch.float64, device=device)
        for i, tensors, here, kept, _ in self._chunks():
            if tensors.gradient is not None:
                gradient = tensors.gradient[here]
                sums[i] += (gradient if kept is None else gradient[kept]).double().square().sum()
        return sums

    @torch.no_grad()
    def make(self, factor: torch.Tensor | None = None) -> None:
        """Make the update with gradients that are multiplied in fp32 by ``factor``, () fp32.

        A factor of NaN changes neither weights nor moments; the update is counted all the same, as
        only the device knows of it.
        """
        counted = {id(t.state): t.state for t in self._tensors if t.gradient is not None}
        for state in counted.values():
            # A new tensor: ZeRO-3 may share one between sub-groups.
            state["step"] = state["step"] + 1
        if self._operators is None:
            self._in_torch_operations(factor)
            return
        kernels, batch = self._operators
        kernels.masked_adamw(batch, [self._coefficients(t) for t in self._tensors], factor)

    def _coefficients(self, tensors: Tensors) -> Coefficients:
        if tensors.gradient is None:  # nothing reads them; before a first update there are none
            return Coefficients(*[0.0] * len(Coefficients._fields))
        found = self._optimizer.coefficients(tensors.group, float(tensors.state["step"]))
        assert found is not None, "the operators implement the rule, or are not used"
        return found

    def _in_torch_operations(self, factor: torch.Tensor | None) -> None:
        if factor is not None and bool(factor.isnan()):
            return
        optimizer = self._optimizer
        for i, tensors, here, kept, span in self._chunks():
            if tensors.gradient is None:
                continue
            gradient = tensors.gradient[here]
            gradient = (gradient if kept is None else gradient[kept]).float()
            if factor is not None:
                gradient = gradient * factor
            values = self._master(tensors, here, kept, span)
            step = float(tensors.state["step"])
            stored = Stored(
                format=optimizer.moment_format,
                signed=optimizer.signed,
                segment=self._segments[i],
                step=int(step),
                tensors=tensors,
                here=here,
                kept=kept,
                span=span,
            )
            moments = [stored.read(number) for number in range(len(tensors.moments))]
            optimizer.rule(values, gradient, moments, tensors.group, step)
            for number, moment in enumerate(moments):
                stored.write(number, moment)
            if optimizer.master == "split":
                tensors.master[span] = split(values)
            elif optimizer.master == "dense" and kept is not None:
                tensors.master[here][kept] = values
            if tensors.weights is not None:
                _write(tensors.weights[here], kept, values)

    def _master(
        self, tensors: Tensors, here: slice, kept: torch.Tensor | None, span: slice
    ) -> torch.Tensor:
        if self._optimizer.master == "compact":
            return tensors.master[span]
        if self._optimizer.master == "dense":
            return tensors.master[here] if kept is None else tensors.master[here][kept]
        assert tensors.weights is not None
        weights = tensors.weights[here]
        return join(weights if kept is None else weights[kept], tensors.master[span])

    def _chunks(self) -> Iterator[tuple[int, Tensors, slice, torch.Tensor | None, slice]]:
        """Yield by chunk: the segment's number and tensors, the chunk's place in the segment, its
        kept elements (None: all), and their place in the compact state."""
        done: dict[int, tuple[int, int]] = {}  # by tensor: elements, and the kept ones among them
        for i, (segment, tensors) in enumerate(zip(self._segments, self._tensors, strict=True)):
            mask = tensors.mask
            passed, before = done.get(segment.tensor, (0, 0))
            if mask is not None and passed < segment.start:  # elements of no segment
                before += int(unpack(mask, segment.start - passed, passed).sum())
            for first in range(0, segment.numel, CHUNK):
                numel = min(CHUNK, segment.numel - first)
                here, start = slice(first, first + numel), segment.start + first
                if mask is None:
                    yield i, tensors, here, None, slice(start, start + numel)
                    continue
                kept = unpack(mask, numel, start).nonzero().view(-1)
                yield i, tensors, here, kept, slice(before, before + kept.numel())
                before += kept.numel()
            done[segment.tensor] = segment.start + segment.numel, before


def _write(out: torch.Tensor, kept: torch.Tensor | None, values: torch.Tensor) -> None:
    if kept is None:
        out.copy_(values)
    else:
        out[kept] = values.to(out.dtype)
