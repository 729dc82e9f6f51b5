"""The random fills that initialisations make, drawn from a key's streams at any place."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers.initialization as hf_init
from torch import nn

from pmp_ds.errors import UserError
from pmp_ds.model.keys import derive
from pmp_ds.model.stream import Floats, normals, uniforms

CHUNK = 1 << 20  # elements drawn at once: 8 MiB of float64
WAY_OUT = "set init.seed for public initial weights, or choose another architecture"
_MAX_REDRAWS = 1000


@dataclass(frozen=True)
class RandomFill:
    """A fill with independent numbers: `normal` (mean, std), `uniform` (low, high) or `truncated`
    (mean, std, low, high), a normal whose numbers outside the bounds are drawn again."""

    kind: str
    arguments: tuple[float, ...]

    @property
    def constant(self) -> bool:
        """Whether all numbers are equal."""
        a, b = self.arguments[:2]
        return a == b if self.kind == "uniform" else b == 0.0

    def draw(self, key: bytes, name: str, number: int, start: int, out: torch.Tensor) -> None:
        """Fill ``out``, (n,) fp32, with the elements from ``start`` on of the filled tensor: fill
        ``number`` of parameter ``name``."""
        stream = derive(key, f"init/{number}/{name}")
        for i in range(0, out.numel(), CHUNK):
            part = out[i : i + CHUNK]
            part.copy_(torch.from_numpy(self._values(stream, start + i, part.numel())))

    def _values(self, stream: bytes, start: int, count: int) -> Floats:
        a, b, *bounds = self.arguments
        if self.kind == "uniform":
            return uniforms(stream, start, count) * (b - a) + a
        value = normals(stream, start, count) * b + a
        if not bounds:
            return value
        low, high = bounds
        for attempt in range(1, _MAX_REDRAWS):
            outside = (value < low) | (value > high)
            if not outside.any():
                return value
            again = normals(derive(stream, f"redraw/{attempt}"), start, count) * b + a
            value[outside] = again[outside]
        raise UserError(
            f"trunc_normal_ with mean {a}, std {b} hardly ever falls inside [{low}, {high}]; "
            f"{WAY_OUT}"
        )


def arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operator by name, defaults included."""
    return {
        spec.name: args[i] if i < len(args) else kwargs.get(spec.name, spec.default_value)
        for i, spec in enumerate(func._schema.arguments)
    }


def random_fill(func: Any, given: dict[str, Any]) -> RandomFill | None:
    """Return the fill that an operator makes with these arguments, or None for another operator."""
    if func is torch.ops.aten.normal_.default:
        return RandomFill("normal", (given["mean"], given["std"]))
    if func is torch.ops.aten.uniform_.default:
        return RandomFill("uniform", (given["from"], given["to"]))
    return None


@contextlib.contextmanager
def truncated_normals(fill: Callable[[torch.Tensor, RandomFill], torch.Tensor]) -> Iterator[None]:
    """Call ``fill`` in place of `trunc_normal_`, whose algorithm differs between torch versions."""

    def replacement(
        tensor: torch.Tensor,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        return fill(tensor, RandomFill("truncated", (mean, std, a, b)))

    functions = hf_init.TORCH_INIT_FUNCTIONS
    original = functions["trunc_normal_"]
    functions["trunc_normal_"] = replacement
    try:
        yield
    finally:
        functions["trunc_normal_"] = original


@contextlib.contextmanager
def aliases_on_meta(model: nn.Module) -> Iterator[None]:
    """Hide every alias of a tied weight, so that it is drawn once, under its first name."""
    seen: set[int] = set()
    hidden: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for leaf, param in module._parameters.items():
            if param is None:
                continue
            if id(param) in seen:
                hidden.append((module, leaf, param))
            seen.add(id(param))
    try:
        for module, leaf, param in hidden:
            stand_in = torch.empty_like(param, device="meta")
            module._parameters[leaf] = nn.Parameter(stand_in, requires_grad=param.requires_grad)
        yield
    finally:
        for module, leaf, param in hidden:
            module._parameters[leaf] = param
