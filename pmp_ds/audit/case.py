"""The case of an audit: the release, the attacker's assumed knowledge, and the true ticket.

Scores are compared on a sample of the elements (all of them in small models), evenly spread over
the global element order, so that the audit of a large release stays short.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds.config import Config
from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError
from pmp_ds.model.folder import add_tensors, embeddings, open_folder
from pmp_ds.model.parameters import constants
from pmp_ds.ticket.mask import ParamMask

SAMPLE = 1 << 21  # elements
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """A Hugging Face folder of safetensors."""

    folder: Path
    config: PreTrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the trained parameters, in the model's own order, as in a ticket."""

    embeddings: frozenset[str]
    """Input and output embeddings."""

    handles: Mapping[str, Any]
    """The open file of each tensor, including those outside the model."""

    constants: frozenset[str]
    """Frozen parameters and persistent buffers: part of the model, but never trained."""

    @classmethod
    def open(cls, folder: Path) -> "Weights":
        """Open a folder. Raises UserError when it is not a model or lacks a parameter."""
        opened = open_folder(folder)
        opened.require_names(exact=False)  # an attack looks for further tensors
        handles = dict(opened.handles)
        for path in sorted(folder.glob("*.safetensors")):
            add_tensors(handles, path)
        model = opened.skeleton
        trained = opened.trained
        fixed = frozenset(opened.shapes | opened.constants) - trained.keys()
        return cls(folder, opened.config, trained, embeddings(model), handles, fixed)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as stored."""
        found: torch.Tensor = self.handles[name].get_tensor(name)
        return found

    @property
    def num_params(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def model(self) -> PreTrainedModel:
        """Return the model with these weights, fp32 on CPU."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *constants(model).items()]:
                tensor.copy_(self.tensor(name))
        return model


@dataclass(frozen=True)
class Shadow:
    """The attacker's own run of the same recipe, with a known ticket."""

    weights: Weights
    mask: ParamMask


@dataclass(frozen=True, kw_only=True)
class Case:
    """The release under attack, and everything given to attack it."""

    release: Weights
    mask: ParamMask | None = None
    config: Config | None = None
    base: Weights | None = None
    derivative: Weights | None = None
    text: Store | None = None
    shadow: Shadow | None = None
    seeds: range = range(1 << 32)
    seconds: float = 15.0
    """Maximum seconds of a search or training in one attack."""

    sample_size: int = SAMPLE

    def __post_init__(self) -> None:
        shapes = dict(self.release.shapes)
        others: dict[str, Weights | ParamMask | None] = {
            "the ticket": self.mask,
            "--base": self.base,
            "--derivative": self.derivative,
        }
        if self.shadow is not None:
            others |= {"--shadow": self.shadow.weights, "its ticket": self.shadow.mask}
        for what, other in others.items():
            if other is not None and _cut(other.shapes, shapes, what) != shapes:
                raise UserError(
                    f"{what} belongs to another model than the release {self.release.folder}: "
                    "names or shapes of their parameters differ"
                )

    def positions(self, name: str) -> torch.Tensor:
        """Return the sampled elements of a parameter, row-major, ascending, (n,) int64."""
        numel = torch.Size(self.release.shapes[name]).numel()
        stride = max(1, -(-self.release.num_params // self.sample_size))
        if stride == 1:
            return torch.arange(numel)
        generator = torch.Generator().manual_seed(numel)
        first = torch.arange(0, numel, stride)
        jitter = torch.randint(stride, first.shape, generator=generator)
        return (first + jitter).clamp_(max=numel - 1)

    def gather(self, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return the sampled elements of ``tensor(name)`` of all parameters, (n,) fp32."""
        parts = [tensor(n).reshape(-1)[self.positions(n)].float() for n in self.release.shapes]
        return torch.cat(parts)

    def sizes(self) -> list[int]:
        """Return the number of sampled elements of each parameter."""
        return [len(self.positions(name)) for name in self.release.shapes]

    def labels(self, mask: ParamMask) -> torch.Tensor:
        """Return which sampled elements are in the ticket, (n,) bool."""
        return self.gather(mask.full) > 0.5

    def outside_embeddings(self) -> torch.Tensor:
        """Return which sampled elements are not in embeddings, (n,) bool."""
        flags = [name not in self.release.embeddings for name in self.release.shapes]
        return torch.tensor(flags).repeat_interleave(torch.tensor(self.sizes()))

    def by_tensor(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores as ranks inside their tensor if the recipe gives all tensors the same share
        (``mask.quota: per_tensor``); otherwise return them unchanged."""
        if self.config is None or self.config.mask.quota != "per_tensor":
            return scores
        return torch.cat([_percentiles(part) for part in scores.split(self.sizes())])


def _cut(found: Shapes, release: Shapes, what: str) -> dict[str, tuple[int, ...]]:
    """Return shapes, those of --base without the rows that only pad its vocabulary: a release has
    none of them."""
    if what != "--base" or found.keys() != release.keys():
        return dict(found)
    first = {name: shape[:1] for name, shape in release.items()}
    return {n: (*map(min, shape[:1], first[n]), *shape[1:]) for n, shape in found.items()}


def _percentiles(scores: torch.Tensor) -> torch.Tensor:
    if len(scores) == 0 or bool((scores == scores[0]).all()):
        return torch.ones_like(scores)
    ranks = torch.empty_like(scores)
    ranks[scores.argsort()] = torch.arange(len(scores), dtype=scores.dtype) / len(scores)
    return ranks
