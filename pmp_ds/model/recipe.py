"""theta(0) as a recipe for each parameter, from which any slice is drawn without the rest.

``describe`` builds the model without memory for its parameters and records what the model's own
initialisation does to each: random fills, constants, copies of small tensors. A slice then takes
the numbers of the key's streams that belong to it. They are the bits that secret_init.initialize
draws into a whole model.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.initialization as hf_init
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds.model.random_fill import (
    RandomFill,
    aliases_on_meta,
    arguments,
    random_fill,
    truncated_normals,
)

_MOST_GIVEN = 1 << 20  # elements of a tensor that is remembered as it is


class NotDescribedError(Exception):
    """An initialisation does what no recipe says; the text names it."""


@dataclass(frozen=True)
class Fill:
    """One write to elements [start, start + numel) of a parameter."""

    start: int
    numel: int
    random: RandomFill | None = None
    number: int = 0  # of the random fill among the parameter's
    value: float | torch.Tensor = 0.0  # (numel,) or for all, where it is not random


@dataclass
class Recipe:
    """What fills a parameter; a later fill hides an earlier one."""

    name: str
    shape: tuple[int, ...]
    fills: list[Fill] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def constant(self) -> bool:
        """Whether all elements are equal, whatever the key."""
        if self.numel == 1:
            return True
        last = self.fills[-1]
        if last.numel == self.numel and last.random is not None:
            return last.random.constant
        if last.numel == self.numel and not isinstance(last.value, torch.Tensor):
            return True
        if any(one.random is not None and not one.random.constant for one in self.fills):
            return False  # of a part of it at least
        whole = self.slice(b"", 0, self.numel)
        return bool((whole == whole[0]).all())

    def slice(self, key: bytes, start: int, count: int) -> torch.Tensor:
        """Return elements [start, start + count), (count,) fp32."""
        out = torch.full((count,), torch.nan)
        for fill in self.fills:
            low, high = max(start, fill.start), min(start + count, fill.start + fill.numel)
            if low >= high:
                continue
            target = out[low - start : high - start]
            if fill.random is not None:
                fill.random.draw(key, self.name, fill.number, low - fill.start, target)
            elif isinstance(fill.value, torch.Tensor):
                target.copy_(fill.value[low - fill.start : high - fill.start])
            else:
                target.fill_(fill.value)
        return out


def describe(config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Recipe]]:
    """Return the model with parameters on the meta device and buffers on the CPU, and its recipes
    by parameter name. Raises NotDescribedError."""
    constants: dict[int, tuple[nn.Parameter, float]] = {}
    with _parameters_on_meta(constants), hf_init.no_init_weights(), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    params = dict(model.named_parameters())
    recipes = {name: Recipe(name, tuple(param.shape)) for name, param in params.items()}
    for name, param in params.items():
        if id(param) in constants:
            recipes[name].fills.append(Fill(0, param.numel(), value=constants[id(param)][1]))
    for owner in (*model.modules(), *params.values()):
        owner.__dict__.pop("_is_hf_initialized", None)
    recorder = _Recorder(params, recipes)
    with aliases_on_meta(model), truncated_normals(recorder.record_random), recorder:
        model.initialize_weights()
    for recipe in recipes.values():
        covered = any(fill.numel == recipe.numel for fill in recipe.fills)
        if recipe.numel and not covered:
            raise NotDescribedError(f"nothing fills all of {recipe.name}")
    return model, recipes


@contextlib.contextmanager
def _parameters_on_meta(constants: dict[int, tuple[nn.Parameter, float]]) -> Iterator[None]:
    """Put parameters on the meta device as modules register them, before they are initialised:
    ``torch.empty`` takes no memory until something is written. ``constants``: the value of those
    that a constructor made constant, by id; the tensors are kept so that no other has the id."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is None or param.is_meta:
            return
        meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        meta.__dict__.update(param.__dict__)
        if 0 < param.numel() <= _MOST_GIVEN:
            low, high = torch.aminmax(param.detach())
            if low == high:
                constants[id(meta)] = meta, float(low)
        self._parameters[name] = meta

    # Where every module stores its parameters, also those of subclasses that do not ask.
    nn.Module.register_parameter = register  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]  # as it was


class _Recorder(TorchDispatchMode):
    """Writes down what is done to ``params``, which are on the meta device."""

    def __init__(self, params: dict[str, nn.Parameter], recipes: dict[str, Recipe]) -> None:
        super().__init__()
        self._names = {p.untyped_storage()._cdata: name for name, p in params.items()}
        self._recipes = recipes
        self._random: dict[str, int] = {}

    def _name(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            return None
        return self._names.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target: Any = args[0] if args else None
        given = arguments(func, args, kwargs)
        random = random_fill(func, given)
        if random is not None:
            return self.record_random(target, random)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotDescribedError(f"it draws with {func}")
        name = self._name(target)
        if name is None or not func._schema.is_mutable:
            return func(*args, **kwargs)
        aten = torch.ops.aten
        if func is aten.fill_.Scalar:
            return self._record(name, target, value=float(given["value"]))
        if func is aten.zero_.default:
            return self._record(name, target, value=0.0)
        source: Any = given.get("src", given.get("value"))
        known = isinstance(source, torch.Tensor) and not source.is_meta
        if known and func in (aten.copy_.default, aten.fill_.Tensor):
            if target.numel() > _MOST_GIVEN:
                raise NotDescribedError(f"it copies all of {name}")
            value = source.detach().float().expand(target.shape).reshape(-1).clone()
            return self._record(name, target, value=value)
        raise NotDescribedError(f"it calls {func} on {name}")

    def record_random(self, target: torch.Tensor, random: RandomFill) -> torch.Tensor:
        """Write down one random fill."""
        name = self._name(target)
        if name is None:
            if target.is_meta:  # a hidden alias of a tied weight
                return target
            raise NotDescribedError("it fills a tensor that is no parameter")
        number = self._random.get(name, 0)
        self._random[name] = number + 1
        return self._record(name, target, random=random, number=number)

    def _record(self, name: str, target: torch.Tensor, **what: Any) -> torch.Tensor:
        if not target.is_contiguous():
            raise NotDescribedError(f"it fills every other element of {name}")
        if target.numel():
            fill = Fill(int(target.storage_offset()), target.numel(), **what)
            self._recipes[name].fills.append(fill)
        return target
