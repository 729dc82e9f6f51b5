"""Optimizer state by position in the model instead of by rank and stage.

A parameter's kept elements are numbered row-major; a fragment's share of `exp_avg`, `exp_avg_sq`
and, for 16-bit training, the fp32 `master` weights is a run of that numbering. So what one
sharding wrote another can read.
"""

from collections.abc import Callable, Iterator

import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.zero_shards import Fragment, ZeroShards
from pmp_ds.ticket.mask import ParamMask

MASTER = "master"

# (kind, parameter, first kept element, count) -> (count,) fp32
Read = Callable[[str, str, int, int], torch.Tensor]


def _spans(
    shards: ZeroShards, mask: ParamMask | None
) -> Iterator[tuple[Fragment, int, slice, torch.Tensor]]:
    """Per fragment: itself, its first kept element's number in the parameter, its span in the
    flat's compact tensors, and (num_kept,) int64 positions of its kept elements in the flat."""
    done = [0] * len(shards.flats)
    for f in shards.fragments:
        if mask is None:
            first, kept = f.start, torch.arange(f.numel)
            span = slice(f.flat_start, f.flat_start + f.numel)  # nothing is left out, nor padding
        else:
            first = mask.num_kept_before(f.name, f.start)
            kept = mask.fragment(f.name, f.start, f.numel).nonzero().view(-1)
            span = slice(done[f.flat], done[f.flat] + kept.numel())
            done[f.flat] = span.stop
        yield f, first, span, kept + f.flat_start


def collect(
    optimizer: MaskedOptimizer, shards: ZeroShards, mask: ParamMask | None, *, master: bool
) -> dict[str, torch.Tensor]:
    """This rank's state on CPU, by `KIND/PARAMETER/FIRST`, (count,) fp32 each."""
    tensors = {}
    for f, first, span, positions in _spans(shards, mask):
        flat = shards.flats[f.flat]
        state = optimizer.state[flat]
        for kind in optimizer.moments:
            tensors[f"{kind}/{f.name}/{first}"] = state[kind][span].cpu().clone()
        if optimizer.compact_master:
            tensors[f"{MASTER}/{f.name}/{first}"] = state[MASTER][span].cpu().clone()
        elif master:
            values = flat.detach().view(-1)[positions.to(flat.device)]
            tensors[f"{MASTER}/{f.name}/{first}"] = values.cpu()
    return tensors


@torch.no_grad()
def restore(
    optimizer: MaskedOptimizer,
    shards: ZeroShards,
    mask: ParamMask | None,
    read: Read,
    step: int,
    *,
    master: bool,
) -> None:
    """Fill this rank's share of an armed optimizer through ``read``."""
    for f, first, span, positions in _spans(shards, mask):
        flat, count = shards.flats[f.flat], span.stop - span.start
        state = optimizer.state[flat]
        for kind in optimizer.moments + (MASTER,) * optimizer.compact_master:
            state[kind][span] = read(kind, f.name, first, count).to(flat.device)
        if master and not optimizer.compact_master:
            values = read(MASTER, f.name, first, count).to(flat.device)
            flat.view(-1)[positions.to(flat.device)] = values
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], float(step))
