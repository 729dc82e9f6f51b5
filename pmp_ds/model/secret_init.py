"""The initial weights theta(0), drawn from a secret key or, in paper mode, from a public seed.

Secret mode repeats the model's own initialisation and replaces the values of every random fill by a
stream keyed by the parameter's name. So the distribution is the model's own for any causal model of
`transformers`, and the bits depend only on the key: not on device, rank, threads, torch version or
processor.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model
from pmp_ds.model.keys import Secret
from pmp_ds.model.random_fill import (
    CHUNK,
    WAY_OUT,
    RandomFill,
    aliases_on_meta,
    arguments,
    random_fill,
    truncated_normals,
)
from pmp_ds.progress import Progress

_SHOW_PROGRESS = 1 << 27  # minimum elements: a few seconds


def initialize(model: PreTrainedModel, init: Secret | int) -> None:
    """Draw theta(0) into ``model`` in place.

    ``init`` is a secret key, or the public seed of paper mode, which gives exactly the weights of
    ``from_config`` after ``torch.manual_seed(seed)``. Every parameter is overwritten; the caller's
    random state stays. Raises UserError if secret mode cannot reproduce the model's own
    initialisation.
    """
    if isinstance(init, bytes):
        _initialize_secret(model, init)
    else:
        _initialize_public(model, init)


def _initialize_public(model: PreTrainedModel, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        drawn = build_model(copy.deepcopy(model.config))
    pairs = zip(model.named_parameters(), drawn.named_parameters(), strict=True)
    with torch.no_grad():
        for (name, param), (drawn_name, value) in pairs:
            assert name == drawn_name
            param.copy_(value)


def _initialize_secret(model: PreTrainedModel, key: bytes) -> None:
    params = dict(model.named_parameters())
    constants = _poison(params)
    for owner in (*model.modules(), *params.values()):  # remove marks of the first initialisation
        owner.__dict__.pop("_is_hf_initialized", None)
    total = sum(param.numel() for name, param in params.items() if name not in constants)
    quiet = total < _SHOW_PROGRESS
    with Progress("initial weights", "element", total, scale=True, disable=quiet) as bar:
        mode = _Keystream(params, key, bar)
        with aliases_on_meta(model), truncated_normals(mode.fill), mode:
            model.initialize_weights()
    with torch.no_grad():
        for name, param in params.items():
            left = param.isnan()
            if name in constants and bool(left.all()):
                param.fill_(constants[name])  # only the constructor sets this constant
            elif bool(left.any()):
                raise UserError(
                    f"{type(model).__name__} does not initialise all of {name} in its "
                    "_init_weights, so secret initial weights would leave public values there; "
                    f"{WAY_OUT}"
                )


def _poison(params: dict[str, nn.Parameter]) -> dict[str, float]:
    """Fill with NaN, so that parameters not drawn again are found; return the constant ones."""
    constants: dict[str, float] = {}
    with torch.no_grad():
        for name, param in params.items():
            if param.numel() == 0:
                continue
            low, high = torch.aminmax(param)
            if low == high:
                constants[name] = float(low)
            param.fill_(float("nan"))
    return constants


class _Keystream(TorchDispatchMode):
    """Replaces random in-place fills of ``params`` by streams of ``key``.

    The n-th fill of a parameter has its own stream; an element's place in it is its row-major place
    in the filled tensor. Any other random operation is an error.
    """

    def __init__(self, params: dict[str, nn.Parameter], key: bytes, bar: Progress) -> None:
        super().__init__()
        self._key = Secret(key)
        self._bar = bar
        self._spans = [
            (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
            for name, p in params.items()
            if p.numel() > 0
        ]
        self._fills: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        random = random_fill(func, arguments(func, args, kwargs))
        if random is None:
            raise UserError(
                f"the model's initialisation draws with {func}, which secret initial weights "
                f"cannot reproduce; {WAY_OUT}"
            )
        return self.fill(args[0], random, func)

    def fill(
        self, tensor: torch.Tensor, random: RandomFill, operation: Any = "trunc_normal_"
    ) -> torch.Tensor:
        """Draw into a parameter, or a part of one."""
        if tensor.is_meta or tensor.numel() == 0:
            return tensor
        address = tensor.data_ptr()
        name = next((name for low, high, name in self._spans if low <= address < high), None)
        if name is None:
            raise UserError(
                f"the model's initialisation fills a tensor other than a parameter with "
                f"{operation}, which secret initial weights cannot reproduce; {WAY_OUT}"
            )
        count = self._fills.get(name, 0)
        self._fills[name] = count + 1
        target = tensor.detach()
        flat = target.view(-1) if target.is_contiguous() else torch.empty(target.numel())
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            random.draw(self._key, name, count, start, part)
            if count == 0:
                self._bar.update(part.numel())
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))
        return tensor
