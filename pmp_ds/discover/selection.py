"""Select the elements of a candidate mask under ``mask.quota`` and ``mask.random_fraction``.

Elements compete in *pools*: all parameters together (`global`), or each parameter by itself
(`per_tensor`, with a share of k in proportion to its size). Always-trained parameters form a pool
that is kept whole. In any other pool of k elements, the floor(random_fraction x k) highest of a
keyed uniform draw are kept whatever their score, the rest by score. Both settings make a mask
harder to guess: docs/SECURITY.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from pmp_ds.config import MaskConfig
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import ParamInfo, num_params
from pmp_ds.model.stream import uniforms
from pmp_ds.optim.zero import Fragment
from pmp_ds.ticket.mask import unpack
from pmp_ds.ticket.ticket import exact_k
from pmp_ds.ticket.topk import TopK

_CHUNK = 1 << 20  # elements drawn at once: 8 MiB of float64


@dataclass(frozen=True)
class _Pool:
    members: list[int]  # indices of this rank's fragments
    top: TopK
    k: int  # kept, over all ranks
    num_drawn: int  # of these, drawn regardless of score


class Selector:
    """Selects candidates of exactly k elements over all ranks, the same for any sharding."""

    def __init__(
        self,
        fragments: Sequence[Fragment],
        table: Sequence[ParamInfo],
        config: MaskConfig,
        key: bytes,  # 32 bytes; used when random_fraction > 0
        *,
        replicated: bool = False,  # every rank holds all fragments
    ) -> None:
        """Draw the random elements. Collective. Raises UserError when always-trained parameters
        leave no room for others."""
        infos = {info.name: info for info in table}
        self._fragments, self._replicated = fragments, replicated
        self._starts = [infos[f.name].start + f.start for f in fragments]
        self._pools = [self._pool(*share) for share in shares(table, config)]
        self._drawn: list[torch.Tensor] | None = None  # packed bits of each fragment
        if config.random_fraction > 0.0:
            draws = [
                _uniform(key, start, f.numel)
                for f, start in zip(fragments, self._starts, strict=True)
            ]
            of_draws = [(p.members, self._top_k(p.members), p.num_drawn) for p in self._pools]
            self._drawn = self._best(draws, of_draws)

    def select(self, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the packed masks (ticket/mask.py) of the fragments. Their ``scores`` are (numel,)
        each and rank by magnitude. Collective; raises UserError as ``select_top_k`` does."""
        if self._drawn is not None:
            pairs = zip(self._drawn, scores, strict=True)
            self._drawn = [bits.to(score.device) for bits, score in pairs]  # once
            scores = [_lifted(s, bits) for s, bits in zip(scores, self._drawn, strict=True)]
        return self._best(scores, [(p.members, p.top, p.k) for p in self._pools])

    def _pool(self, names: set[str], k: int, num_drawn: int) -> _Pool:
        members = [i for i, f in enumerate(self._fragments) if f.name in names]
        return _Pool(members, self._top_k(members), k, num_drawn)

    def _top_k(self, members: Sequence[int]) -> TopK:
        return TopK(
            [self._starts[i] for i in members],
            [self._fragments[i].name for i in members],
            replicated=self._replicated,
        )

    def _best(
        self, scores: Sequence[torch.Tensor], pools: Sequence[tuple[Sequence[int], TopK, int]]
    ) -> list[torch.Tensor]:
        """Return packed masks with the highest scores of each pool: members, selection, number."""
        bits: list[torch.Tensor] = [torch.empty(0)] * len(scores)
        of_pools, bad = [[scores[i] for i in members] for members, *_ in pools], []
        for (members, top, count), own in zip(pools, of_pools, strict=True):
            found, non_finite = top.select(own, count)
            bad.append(non_finite)
            for i, packed in zip(members, found, strict=True):
                bits[i] = packed
        if int(torch.stack(bad).sum()):  # the one thing to wait for
            for (_, top, _), own in zip(pools, of_pools, strict=True):
                top.raise_non_finite(own)
        return bits


def shares(table: Sequence[ParamInfo], config: MaskConfig) -> list[tuple[set[str], int, int]]:
    """Return each pool: its parameters, how many elements it keeps, and how many are drawn."""
    total = num_params(table)
    k = exact_k(config.density, total)
    whole = {i.name: i.numel for i in table if config.always_train and i.constant}
    ranked = {i.name: i.numel for i in table if i.name not in whole}
    num_whole = sum(whole.values())
    if not 0 <= k - num_whole <= sum(ranked.values()):
        raise UserError(
            f"the ticket keeps k={k} elements, but {num_whole} of {total} are always trained "
            "(mask.always_train): choose a mask.density that leaves room, or switch "
            "mask.always_train off"
        )
    if config.quota == "global":
        found = [(set(ranked), k - num_whole)]
    else:
        found = [({name}, n) for name, n in proportional(k - num_whole, ranked).items()]
    fraction = Fraction(repr(config.random_fraction))  # the decimal that the user wrote
    pools = [(names, n, int(fraction * n)) for names, n in found]
    return [(set(whole), num_whole, 0), *pools] if whole else pools


def proportional(k: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Share ``k`` in proportion to ``sizes``: round down, then give the rest one by one to the
    largest remainders, ties in order. No share exceeds its size when k <= sum of sizes."""
    total = sum(sizes.values())
    shares = {name: k * size // total for name, size in sizes.items()}
    rest = sorted(sizes, key=lambda name: -(k * sizes[name] % total))  # stable: ties in order
    for name in rest[: k - sum(shares.values())]:
        shares[name] += 1
    return shares


def _uniform(key: bytes, start: int, numel: int) -> torch.Tensor:
    """Return the draws of global elements ``start .. start + numel``, (numel,) fp32 on CPU."""
    parts = [
        torch.from_numpy(uniforms(key, low, min(_CHUNK, start + numel - low))).float()
        for low in range(start, start + numel, _CHUNK)
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def _lifted(score: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return a copy in which drawn elements rank above all others; non-finite scores stay."""
    drawn = unpack(bits, score.numel())
    return score.masked_fill(drawn & score.isfinite(), torch.finfo(score.dtype).max)
