"""Store optimizer state by position in the model instead of by rank and stage.

A parameter's kept elements are numbered in row-major order. A fragment's share of `exp_avg`,
`exp_avg_sq` and, in 16-bit training, of the fp32 `master` weights is a run of these numbers, so
state written under one sharding can be read under another.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from pmp_ds.optim.zero import Fragment, ZeroShards
from pmp_ds.ticket.mask import ParamMask

MASTER = "master"

Collected = Callable[[], dict[str, torch.Tensor]]
# (kind, parameter, first kept element, count) -> (count,) fp32
Read = Callable[[str, str, int, int], torch.Tensor]


def _spans(shards: ZeroShards, mask: ParamMask | None) -> Iterator[tuple[Fragment, int, slice]]:
    """Yield each fragment, the number of its first kept element within the parameter, and its span
    in the flat's compact tensors."""
    done = [0] * len(shards.flats)
    for f in shards.fragments:
        if mask is None:  # compact tensors are then as long as the flat, padding included
            yield f, f.start, slice(f.flat_start, f.flat_start + f.numel)
        else:
            first = mask.num_kept_before(f.name, f.start)
            count = mask.num_kept_before(f.name, f.start + f.numel) - first
            done[f.flat] += count
            yield f, first, slice(done[f.flat] - count, done[f.flat])


def _kept(f: Fragment, mask: ParamMask | None) -> torch.Tensor:
    """Return the mask of a fragment, (numel,) bool on CPU."""
    if mask is None:
        return torch.ones(f.numel, dtype=torch.bool)
    return mask.fragment(f.name, f.start, f.numel)


class Stateful(Protocol):
    """An optimizer whose moments have one value per kept element of each tensor."""

    compact_master: bool

    @property
    def moments(self) -> tuple[str, ...]: ...

    @property
    def state(self) -> Any: ...


def collect(
    optimizer: Stateful, shards: ZeroShards, mask: ParamMask | None, *, master: bool
) -> Collected:
    """Copy this rank's state to CPU memory and return a function that converts the copy.

    The function may run in any thread and returns `KIND/PARAMETER/FIRST` -> (count,) fp32.
    """
    kinds = optimizer.moments + (MASTER,) * optimizer.compact_master
    compact = [
        {kind: _copy(optimizer.state[flat][kind]) for kind in kinds} for flat in shards.flats
    ]
    dense = [
        _copy(flat) if master and not optimizer.compact_master else None for flat in shards.flats
    ]

    def in_logical_form() -> dict[str, torch.Tensor]:
        tensors = {}
        for f, first, span in _spans(shards, mask):
            for kind, values in compact[f.flat].items():
                tensors[f"{kind}/{f.name}/{first}"] = values[span].clone()
            if (master_of := dense[f.flat]) is not None:
                whole = master_of[f.flat_start : f.flat_start + f.numel]
                tensors[f"{MASTER}/{f.name}/{first}"] = whole[_kept(f, mask)]
        return tensors

    return in_logical_form


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).to("cpu", copy=True)


@torch.no_grad()
def restore(
    optimizer: Stateful,
    shards: ZeroShards,
    mask: ParamMask | None,
    read: Read,
    *,
    master: bool,
) -> None:
    """Fill this rank's share of an armed optimizer through ``read``; the caller sets the number of
    updates."""
    for f, first, span in _spans(shards, mask):
        flat, count = shards.flats[f.flat], span.stop - span.start
        state = optimizer.state[flat]
        for kind in optimizer.moments + (MASTER,) * optimizer.compact_master:
            state[kind].view(-1)[span] = read(kind, f.name, first, count).to(flat.device)
        if master and not optimizer.compact_master:
            values = read(MASTER, f.name, first, count).to(flat.device)
            whole = flat.view(-1)[f.flat_start : f.flat_start + f.numel]
            whole[_kept(f, mask).to(flat.device)] = values
