"""theta(0) of a configuration: its element order, its digest, and any slice of it.

With a secret key, slices are drawn from recipes, with a base they are read from its files, and
nothing is ever whole. The public seed of paper mode draws from torch's generator, which gives all
numbers in one sequence; so it, and a model that no recipe describes, is whole, 4 bytes per
parameter.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pmp_ds.model.base import Base
from pmp_ds.model.build import build_model
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import ParamInfo, parameter_table
from pmp_ds.model.recipe import NotDescribedError, Recipe, describe
from pmp_ds.model.secret_init import initialize
from pmp_ds.progress import Progress

Read = Callable[[str, int, int], torch.Tensor]
"""(parameter, first element, count) -> (count,) of its elements in row-major order."""
Part = tuple[int, int]
"""This rank's number and the number of ranks that share a work."""
WHOLE: Part = (0, 1)
_DIGEST_CHUNK = 1 << 22  # elements; part of the digest's definition
_SHOW_PROGRESS = 1 << 27  # minimum elements: a few seconds


class Initial:
    """theta(0) of ``config`` from a key, a public seed or, if there is one, ``base``. Raises
    UserError as ``initialize``."""

    reason: str | None = None
    """Why it is whole on every rank, or None."""

    def __init__(
        self, config: PreTrainedConfig, init: Secret | int, base: Base | None = None
    ) -> None:
        self._config, self._init, self.base = config, init, base
        self._whole: dict[str, torch.Tensor] | None = None
        self._recipes: dict[str, Recipe] | None = None
        if not isinstance(init, Secret):
            self.reason = "init.seed draws from one sequence of numbers"
        else:
            try:
                model, self._recipes = describe(copy.deepcopy(config))
            except NotDescribedError as error:
                self.reason = f"{config.model_type} initialises itself in a way of its own: {error}"
        if self._recipes is None:
            model = self._draw()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        constant = None  # found in the whole weights
        if base is not None:
            constant = {name: base.is_constant(name, shape) for name, shape in self.shapes.items()}
        elif self._recipes is not None:
            constant = {name: recipe.constant for name, recipe in self._recipes.items()}
        self.table: tuple[ParamInfo, ...] = parameter_table(model, constant)

    @property
    def is_gone(self) -> bool:
        """Whether it was read from a folder that no longer exists. ``read`` then raises UserError,
        and ``model`` has any values."""
        return self.base is not None and self.base.opened is None

    def model(self) -> PreTrainedModel:
        """Return a new model: with parameters on the meta device, for ``read`` to fill, or, if
        there is a ``reason``, at theta(0) in fp32 on the CPU. Buffers are on the CPU."""
        if self._recipes is None:
            return self._draw()
        model = describe(copy.deepcopy(self._config))[0]
        if self.base is not None:
            self.base.fill_constants(model)
        return model

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return elements [start, start + count) of a parameter, (count,) fp32. Raises UserError
        when the base is gone."""
        if self.base is not None:
            return self.base.read(name, start, count)
        if self._recipes is not None:
            assert isinstance(self._init, Secret)
            return self._recipes[name].slice(self._init, start, count)
        if self._whole is None:
            self._whole = {n: p.detach() for n, p in self._draw().named_parameters()}
        return self._whole[name].reshape(-1)[start : start + count]

    def forget(self) -> None:
        """Free what ``read`` may have drawn whole."""
        self._whole = None

    def _draw(self) -> PreTrainedModel:
        model = build_model(copy.deepcopy(self._config))
        if self.base is not None:
            self.base.fill(model)
        else:
            initialize(model, self._init)
        return model

    def chunk_digests(self, part: Part = WHOLE) -> dict[int, bytes]:
        """Return the SHA-256 of this rank's share of the chunks of the trainable elements, with a
        base of all elements, fp32 in little-endian bytes, by number; ``digest_of`` combines those
        of all ranks."""
        digested = self._trained if self.base is None else self.base.sizes
        todo = list(enumerate(cut(digested, _DIGEST_CHUNK)))[part[0] :: part[1]]
        found = {}
        elements = sum(count for _, (_, _, count) in todo)
        with self.progress("checking theta(0)", elements, part) as bar:
            for number, (name, start, count) in todo:
                values = self.read(name, start, count).contiguous()
                found[number] = hashlib.sha256(values.view(torch.uint8).numpy().data).digest()
                bar.update(count)
        return found

    def older_digest(self) -> str:
        """Return ``parameters.weights_digest`` of theta(0), which runs of older versions remember:
        of all bytes in one sequence, on one rank."""
        sha = hashlib.sha256()
        with self.progress("checking theta(0)", sum(self._trained.values())) as bar:
            for name, start, count in cut(self._trained, _DIGEST_CHUNK):
                values = self.read(name, start, count).contiguous()
                sha.update(values.view(torch.uint8).numpy().data)
                bar.update(count)
        return sha.hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """The number of elements of every parameter, frozen ones included."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def _trained(self) -> dict[str, int]:
        return {info.name: info.numel for info in self.table}

    def progress(self, title: str, elements: int, part: Part = WHOLE) -> Progress:
        """Return a bar for this rank's share of so many elements, shown if all take seconds."""
        quiet = sum(self.sizes.values()) < _SHOW_PROGRESS or part[0] > 0
        return Progress(title, "element", elements, scale=True, disable=quiet)


def cut(sizes: Mapping[str, int], most: int) -> Iterator[tuple[str, int, int]]:
    """Cut parameters of these sizes into runs of up to ``most`` elements: (name, first, count)."""
    for name, numel in sizes.items():
        for start in range(0, numel, most):
            yield name, start, min(most, numel - start)


def digest_of(found: Sequence[Mapping[int, bytes]]) -> str:
    """Return the digest of theta(0) from ``chunk_digests`` of all parts: the SHA-256 (hex) of the
    chunks' digests in order."""
    every = {number: digest for one in found for number, digest in one.items()}
    return hashlib.sha256(b"".join(every[number] for number in sorted(every))).hexdigest()
