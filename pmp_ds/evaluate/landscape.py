"""The loss around a model: L(theta + alpha * delta) along random and given directions (the paper's
Figure 5).

A random direction is a standard normal vector z, which for a given seed is the same on every
machine. It is restricted to the `ticket` or the `complement`, or left whole (`full`), and scaled:
- `global`: ||delta|| = ||theta|| over all elements, so alpha is the relative size of the step;
- `per_tensor`: the same for every tensor separately;
- `per_row`: the same for every matrix row and every vector, after Li et al. (2018).
Under the latter two, tensors or rows that are entirely in or out of the ticket do not move in any
of the three directions, so that the steps differ only in the choice of elements.

The weights are read from disk again for each alpha: the only extra copy of the model is the
direction.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pmp_ds.evaluate.subject import Read
from pmp_ds.model.keys import derive
from pmp_ds.model.stream import normals
from pmp_ds.ticket.mask import ParamMask

KINDS = ("ticket", "full", "complement")
SCALES = ("global", "per_tensor", "per_row")
ALPHAS = (-0.5, -0.2, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
TUNED_ALPHAS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Steps along a fine-tuning, which ends at alpha = 1."""

Direction = dict[str, torch.Tensor]
"""delta of every parameter, in its shape, fp32; exactly 0 for weights that do not move."""
Floats = NDArray[np.float64]


def landscape(
    model: nn.Module,
    read: Read,
    mask: ParamMask,
    loss: Callable[[], float],
    alphas: Sequence[float],
    seeds: Iterable[int],
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Return losses along random directions, and leave ``model`` unchanged to the bit.

    `losses[kind][scale][seed][alpha]` in nats, `norms[kind][scale][seed]` of the directions, `norm`
    of the weights, and `moved[scale]`, the share of elements whose tensor or row may move.
    """
    losses: dict[str, Any] = {kind: {scale: [] for scale in SCALES} for kind in KINDS}
    norms: dict[str, Any] = {kind: {scale: [] for scale in SCALES} for kind in KINDS}
    for seed in seeds:
        for kind in KINDS:
            for scale in SCALES:
                delta = random_direction(read, mask, kind, scale, seed)
                norms[kind][scale].append(norm(delta.values()))
                losses[kind][scale].append(walk(model, read, delta, alphas, loss, tick))
    return {
        "alphas": list(alphas),
        "norm": norm(read(name) for name in mask.shapes),
        "moved": {scale: _moved(mask, scale) for scale in SCALES},
        "directions": losses,
        "norms": norms,
    }


def along_tuning(
    model: nn.Module,
    read: Read,
    tuned: Read,
    mask: ParamMask,
    loss: Callable[[], float],
    tick: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Return the same for delta = tuned - theta, unscaled, and for its parts in and out of the
    ticket."""
    losses, norms = {}, {}
    for kind in KINDS:
        delta = {
            name: (tuned(name).float() - read(name).float()) * _support(mask.full(name), kind)
            for name in mask.shapes
        }
        norms[kind] = norm(delta.values())
        losses[kind] = walk(model, read, delta, TUNED_ALPHAS, loss, tick)
    return {"alphas": list(TUNED_ALPHAS), "losses": losses, "norms": norms}


def random_direction(read: Read, mask: ParamMask, kind: str, scale: str, seed: int) -> Direction:
    """Return a direction of ``kind``, scaled by ``scale``; z depends on the seed alone."""
    delta: Direction = {}
    theta_square = delta_square = 0.0
    for name, shape in mask.shapes.items():
        kept = _units(mask.full(name).numpy(), scale)
        theta = _units(read(name).double().numpy(), scale)
        z = _normals(seed, name, kept.shape)
        z *= _support(kept, kind)
        if scale != "global":
            factors = np.sqrt(_squares(theta) / np.maximum(_squares(z), 1e-300))
            z *= np.where(_mixed(kept), factors, 0.0)[:, None]
        theta_square += float(_squares(theta).sum())
        delta_square += float(_squares(z).sum())
        delta[name] = torch.from_numpy(z.astype(np.float32)).view(shape)
    if scale == "global":
        for tensor in delta.values():
            tensor.mul_(math.sqrt(theta_square / delta_square))
    return delta


def walk(
    model: nn.Module,
    read: Read,
    delta: Direction,
    alphas: Sequence[float],
    loss: Callable[[], float],
    tick: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Return ``loss()`` at theta + alpha * delta for each alpha, then restore ``model``."""
    found = []
    try:
        for alpha in alphas:
            place(model, read, delta, alpha)
            found.append(loss())
            tick(1)
    finally:
        place(model, read, {}, 0.0)
    return found


@torch.no_grad()
def place(model: nn.Module, read: Read, delta: Direction, alpha: float) -> None:
    """Set ``model`` to theta + alpha * delta; where delta = 0, it is theta bit for bit."""
    for name, param in model.named_parameters():
        theta = read(name).to(param.device, param.dtype)
        if name in delta:
            step = delta[name].to(param.device)
            theta = torch.where(step == 0, theta, theta + alpha * step)
        param.copy_(theta)


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm over all elements, the same for any number of threads."""
    return math.sqrt(sum(float(_squares(t.double().numpy().reshape(1, -1))[0]) for t in tensors))


def _normals(seed: int, name: str, shape: tuple[int, ...]) -> Floats:
    key = derive(hashlib.sha256(f"landscape {seed}".encode()).digest(), name)
    return normals(key, 0, math.prod(shape)).reshape(shape)


def _support(kept: Any, kind: str) -> Any:
    return {"ticket": kept, "full": kept | ~kept, "complement": ~kept}[kind]


def _units(values: NDArray[Any], scale: str) -> NDArray[Any]:
    """Return the rows that are scaled together: those of a matrix, or the whole tensor."""
    by_row = scale == "per_row" and values.ndim > 1
    return values.reshape(values.shape[0] if by_row else 1, -1)


def _mixed(kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which rows have elements of both kinds, (R, C) to (R,)."""
    return np.asarray(kept.any(axis=1) & ~kept.all(axis=1))


def _moved(mask: ParamMask, scale: str) -> float:
    if scale == "global":
        return 1.0
    units = (_units(mask.full(name).numpy(), scale) for name in mask.shapes)
    return sum(int(_mixed(kept).sum()) * kept.shape[1] for kept in units) / mask.num_params


def _squares(rows: Floats) -> Floats:
    """Return the sum of squares of each row, (R, C) to (R,); einsum uses no threads."""
    found: Floats = np.einsum("ij,ij->i", rows, rows)
    return found


def num_evaluations(alphas: Sequence[float], seeds: Sequence[int], tuned: bool) -> int:
    """Return how often ``landscape``, and with ``tuned`` ``along_tuning``, compute the loss."""
    given = len(KINDS) * len(TUNED_ALPHAS) if tuned else 0
    return len(KINDS) * len(SCALES) * len(alphas) * len(seeds) + given
