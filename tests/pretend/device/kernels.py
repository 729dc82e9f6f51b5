"""The Triton operators by their C++ twins, which read the same `Batch`: device tensors have their
addresses in host memory here. Each call is one launch, as of a Triton kernel, and moves what that
reads and writes: the tables of its blocks, the masks whole, all others at kept elements."""

import ctypes
import functools
import sys
from collections.abc import Sequence
from unittest import mock

import torch

from pmp_ds.engine import objective
from pmp_ds.optim import kernels
from pmp_ds.optim.kernels import cpu
from pmp_ds.optim.kernels.batch import Batch, Coefficients
from pmp_ds.optim.kernels.cpu import CBatch
from pmp_ds.ticket import topk
from pmp_ds.ticket.counting import Counting, CpuCounting, Scores, counting_for

_BLOCK_TABLES = 4 + 8 + 8 + 4  # bytes per block: segment, first, kept_before, kept_count
_ADDRESSES, _COEFFICIENTS = (8 + 3) * 8, 10 * 4  # bytes per segment; addresses, begin, end, place

supports = cpu.supports


def masked_adamw(
    batch: Batch, coefficients: Sequence[Coefficients], factor: torch.Tensor | None
) -> None:
    """See ``Kernels``."""
    _launch(batch, "masked_adamw", updates=True)
    cpu.masked_adamw(batch, coefficients, factor)


def sums_of_squares(batch: Batch) -> torch.Tensor:
    """See ``Kernels``."""
    layout = batch.layout
    sums = torch.empty(layout.num_blocks, dtype=torch.float64, device=layout.device)
    _launch(batch, "sums_of_squares", updates=False, out=[sums])
    cpu._loaded().pmp_sums_of_squares(
        ctypes.byref(CBatch.of(batch)), ctypes.c_void_p(sums.data_ptr()), cpu._threads()
    )
    return layout.by_segment(sums)


def _launch(batch: Batch, name: str, *, updates: bool, out: Sequence[torch.Tensor] = ()) -> None:
    layout = batch.layout
    reads = [layout.segment, layout.first, layout.kept_before, layout.kept_count, batch.addresses]
    writes = list(out)
    moved = layout.num_blocks * _BLOCK_TABLES + len(layout.segments) * _ADDRESSES
    moved += sum(tensor.nbytes for tensor in out)
    if updates:
        moved += len(layout.segments) * _COEFFICIENTS
    for numel, kept, each in zip(*_sizes(batch), batch.tensors, strict=True):
        if each.gradient is None:
            continue
        reads += [tensor for tensor in (each.gradient, each.mask) if tensor is not None]
        moved += kept * each.gradient.itemsize
        moved += numel // 8 if each.mask is not None else 0
        if updates:
            written = [each.master, *each.moments, *each.exponents]
            reads += written
            moved += kept * sum(one.itemsize for one in (each.master, *each.moments)) * 2
            moved += sum(exponents.nbytes for exponents in each.exponents) * 2
            if each.weights is not None:
                written.append(each.weights)
                moved += kept * each.weights.itemsize
            if batch.master == "split":
                assert each.weights is not None
                reads.append(each.weights)
                moved += kept * each.weights.itemsize
            writes += written
    torch.ops.pretend.launch([t.detach() for t in reads], [t.detach() for t in writes], name, moved)


def _sizes(batch: Batch) -> tuple[list[int], list[int]]:
    """The elements of each segment, and how many are kept."""
    layout, alias = batch.layout, torch.ops.pretend.cpu_alias
    kept = torch.zeros(len(layout.segments), dtype=torch.int64)
    kept.index_add_(0, alias(layout.segment).long(), alias(layout.kept_count).long())
    return [segment.numel for segment in layout.segments], kept.tolist()


class HostCounting:
    """The passes over scores of ticket/counting_cuda.py, a launch for each fragment."""

    def histogram(
        self, scores: Scores, bins: int, shift: int, top: torch.Tensor | None
    ) -> torch.Tensor:
        high = None if top is None else _alias(top)
        found = CpuCounting().histogram(list(map(_alias, scores)), bins, shift, high)
        (counts,) = _on_device([found])
        for score in scores:
            _counted("histogram", [score], [counts])
        return counts

    def equals(self, scores: Scores, key: torch.Tensor) -> list[torch.Tensor]:
        found = _on_device(CpuCounting().equals(list(map(_alias, scores)), _alias(key)))
        for score, counts in zip(scores, found, strict=True):
            _counted("equals", [score, key], [counts])
        return found

    def masks(
        self, scores: Scores, key: torch.Tensor, equals: list[torch.Tensor], quotas: torch.Tensor
    ) -> list[torch.Tensor]:
        given = [list(map(_alias, tensors)) for tensors in (scores, equals)]
        made = CpuCounting().masks(given[0], _alias(key), given[1], _alias(quotas))
        found = _on_device(made)
        for score, counts, bits in zip(scores, equals, found, strict=True):
            _counted("masks", [score, key, counts, quotas], [bits])
        return found


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias: torch.Tensor = torch.ops.pretend.cpu_alias(tensor)
    return alias


def _on_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    made = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
    for one, values in zip(made, tensors, strict=True):
        _alias(one).copy_(values)
    return made


def _counted(name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
    moved = sum(tensor.nbytes for tensor in (*reads, *writes))
    torch.ops.pretend.launch([t.detach() for t in reads], writes, name, moved)


def _counting_for(device: torch.device) -> Counting:
    return HostCounting() if device.type == "cuda" else counting_for(device)


def install() -> None:
    """Let the product find these where it looks for Triton's."""
    mock.patch.object(kernels, "_triton_kernels", return_value=sys.modules[__name__]).start()
    mock.patch.object(topk, "counting_for", _counting_for).start()
    in_torch = functools.partial(objective.chunked_cross_entropy, backend="torch")
    mock.patch.object(objective, "chunked_cross_entropy", in_torch).start()
