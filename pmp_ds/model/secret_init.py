"""The initial weights theta(0), drawn from a secret key or, in paper mode, from a public seed.

Secret mode repeats the model's own initialisation and replaces the values of every random fill by a
stream keyed by the parameter's name. So the distribution is the model's own for any causal model of
`transformers`, and the bits depend only on the key: not on device, rank, threads, torch version or
processor.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.initialization as hf_init
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pmp_ds.errors import UserError
from pmp_ds.foreign import MissingError, read_bytes
from pmp_ds.model.build import build_model
from pmp_ds.model.stream import Floats, normals, uniforms
from pmp_ds.progress import Progress
from pmp_ds.run_dir import atomic_path, make_private

KEY_BYTES = 32
KEY_FILE = "key"
_MOST_BYTES = 1 << 20
_CHUNK = 1 << 20  # elements drawn at once: 8 MiB of float64
_MAX_REDRAWS = 1000
_WAY_OUT = "set init.seed for public initial weights, or choose another architecture"
_SHOW_PROGRESS = 1 << 27  # minimum elements: a few seconds


class Secret(bytes):
    """Key bytes that stay hidden in logs, tracebacks and f-strings."""

    def __repr__(self) -> str:
        return f"Secret(<{len(self)} bytes>)"

    __str__ = __repr__


def create_key(folder: Path) -> Secret:
    """Write a new 32-byte key, ``folder``/key (a run's ``private/init``), and return it.

    The folder becomes 0700, and the file is 0600 before its first byte. The caller must know that
    nothing depends on an earlier key of that folder.
    """
    make_private(folder)
    path = folder / KEY_FILE
    if not path.exists():
        with atomic_path(path, private=True) as temporary:
            temporary.write_bytes(os.urandom(KEY_BYTES))
    return load_key(folder)


def load_key(folder: Path) -> Secret:
    """Return the key in ``folder``. Raises UserError when it is missing or damaged."""
    path = folder / KEY_FILE
    try:
        key = read_bytes(path, _MOST_BYTES)
    except MissingError:
        raise UserError(
            f"{path} is missing: restore the run's own key from a backup; no other key can replace "
            "it"
        ) from None
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} has {len(key)} bytes, but a key has {KEY_BYTES}: restore the run's own key "
            "from a backup; no other key can replace it"
        )
    return Secret(key)


def derive(key: bytes, purpose: str) -> Secret:
    """Derive a 32-byte key for ``purpose`` (HKDF-SHA256, RFC 5869); none reveals another.

    Purposes that start with ``init/`` belong to the initial weights.
    """
    hkdf = HKDF(
        algorithm=hashes.SHA256(), length=KEY_BYTES, salt=b"pmp-ds v1", info=purpose.encode()
    )
    return Secret(hkdf.derive(bytes(key)))


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
        with _aliases_on_meta(model), _truncated_normal(mode), mode:
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
                    f"{_WAY_OUT}"
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


@contextlib.contextmanager
def _aliases_on_meta(model: nn.Module) -> Iterator[None]:
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


@contextlib.contextmanager
def _truncated_normal(mode: "_Keystream") -> Iterator[None]:
    """Replace `trunc_normal_`, whose algorithm differs between torch versions, by our own."""
    functions = hf_init.TORCH_INIT_FUNCTIONS
    original = functions["trunc_normal_"]
    functions["trunc_normal_"] = mode.truncated_normal_
    try:
        yield
    finally:
        functions["trunc_normal_"] = original


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
        given = {
            spec.name: args[i] if i < len(args) else kwargs.get(spec.name, spec.default_value)
            for i, spec in enumerate(func._schema.arguments)
        }
        if func is torch.ops.aten.normal_.default:
            mean, std = given["mean"], given["std"]
            return self._fill(args[0], func, normals, lambda z: z * std + mean)
        if func is torch.ops.aten.uniform_.default:
            low, high = given["from"], given["to"]
            return self._fill(args[0], func, uniforms, lambda u: u * (high - low) + low)
        raise UserError(
            f"the model's initialisation draws with {func}, which secret initial weights cannot "
            f"reproduce; {_WAY_OUT}"
        )

    def truncated_normal_(
        self,
        tensor: torch.Tensor,
        mean: float = 0.0,
        std: float = 1.0,
        a: float = -2.0,
        b: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Redraw normals outside [a, b] from further streams until all are inside."""

        def draw(key: bytes, start: int, count: int) -> Floats:
            value = normals(key, start, count) * std + mean
            for attempt in range(1, _MAX_REDRAWS):
                outside = (value < a) | (value > b)
                if not outside.any():
                    return value
                again = normals(derive(key, f"redraw/{attempt}"), start, count) * std + mean
                value[outside] = again[outside]
            raise UserError(
                f"trunc_normal_ with mean {mean}, std {std} hardly ever falls inside [{a}, {b}]; "
                f"{_WAY_OUT}"
            )

        return self._fill(tensor, "trunc_normal_", draw, lambda value: value)

    def _fill(
        self,
        tensor: torch.Tensor,
        operation: Any,
        draw: Callable[[bytes, int, int], Floats],
        scale: Callable[[Floats], Floats],
    ) -> torch.Tensor:
        if tensor.is_meta or tensor.numel() == 0:
            return tensor
        address = tensor.data_ptr()
        name = next((name for low, high, name in self._spans if low <= address < high), None)
        if name is None:
            raise UserError(
                f"the model's initialisation fills a tensor other than a parameter with "
                f"{operation}, which secret initial weights cannot reproduce; {_WAY_OUT}"
            )
        count = self._fills.get(name, 0)
        self._fills[name] = count + 1
        key = derive(self._key, f"init/{count}/{name}")
        target = tensor.detach()
        flat = target.view(-1) if target.is_contiguous() else torch.empty(target.numel())

        for start in range(0, flat.numel(), _CHUNK):
            size = min(_CHUNK, flat.numel() - start)
            values = scale(draw(key, start, size))
            flat[start : start + size].copy_(torch.from_numpy(values))
            if count == 0:
                self._bar.update(size)
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))
        return tensor
