"""The ticket's density by kind of parameter: for its owner only, as secret as the ticket."""

import re
from collections import defaultdict

from pmp_ds.ticket.mask import ParamMask, popcount

_BAR = 20


def by_kind(mask: ParamMask) -> dict[str, list[tuple[int, int]]]:
    """Return parameter name with `*` for the layer number -> (kept, elements) of each layer, in
    model order."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name in mask.shapes:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        found[kind].append((popcount(mask.bits[name]), mask.numel(name)))
    return dict(found)


def frozen(mask: ParamMask) -> list[str]:
    """Return `KIND (in 3 of 12)` for parameters with nothing kept, which stay at theta(0)."""
    return [
        f"{kind} (in {empty} of {len(layers)})"
        for kind, layers in by_kind(mask).items()
        if (empty := sum(not kept for kept, _ in layers))
    ]


def describe(mask: ParamMask) -> str:
    """Return a line per kind: elements, density with a bar, and the range over layers."""
    kinds = by_kind(mask)
    width = max(map(len, kinds))
    lines = []
    for kind, layers in kinds.items():
        kept, numel = (sum(column) for column in zip(*layers, strict=True))
        shares = [k / n for k, n in layers]
        line = f"{kind:{width}}  {numel:>15,}  {kept / numel:.3f} {_bar(kept / numel)}"
        if min(shares) < max(shares):
            line += f"  {min(shares):.3f} to {max(shares):.3f}"
        lines.append(line)
    kept = mask.num_kept
    lines.append(f"{'all':{width}}  {mask.num_params:>15,}  {kept / mask.num_params:.3f}")
    return "\n".join(lines)


def _bar(share: float) -> str:
    return ("#" * round(share * _BAR)).ljust(_BAR, ".")
