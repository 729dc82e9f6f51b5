"""What is trained on what: `init`, `model` and `data`."""

import math
from dataclasses import dataclass
from typing import Literal

from pmp_ds.errors import require

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "max_positions",
)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The initial weights theta(0)."""

    seed: int | None = None
    """Paper mode: draw theta(0) from this public torch seed, so that anyone who knows it can find
    the mask. Leave it unset for secret weights from a random key in `private/init/`."""

    weights: str | None = None
    """Take theta(0) from this folder (config.json and safetensors) instead of drawing it. Whoever
    else has these weights can compute the mask from the release. The folder may move between
    restarts of a run, with the same weights."""

    def __post_init__(self) -> None:
        require(
            self.seed is None or self.weights is None,
            f"init.seed={self.seed} and init.weights={self.weights} exclude each other: theta(0) "
            "is drawn from the seed or read from the folder; leave one of them unset",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**63,
            f"init.seed={self.seed} must be between 0 and 2^63 - 1",
        )

    @property
    def is_drawn_in_secret(self) -> bool:
        """Whether theta(0) is drawn from the run's key."""
        return self.seed is None and self.weights is None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, built with the classes of `transformers`."""

    family: Literal["llama", "gpt2", "auto"] = "llama"
    """`llama`, `gpt2`, or `auto`: any causal model from the config.json at `model.path`."""

    path: str | None = None
    """For `auto`: a folder with a config.json, or the file itself. No weights are read. Unset means
    the config.json of `init.weights`."""

    vocab_size: int | None = None
    """Rows of the embedding; unset means the tokenizer's own size. Further rows count in d and k,
    and the release leaves them out; no GPU needs them, however odd the number."""

    hidden_size: int = 2048
    """Width of the residual stream."""

    num_layers: int = 22
    """Transformer blocks."""

    num_heads: int = 32
    """Attention heads."""

    num_kv_heads: int | None = None
    """Key and value heads (`llama`); unset means `num_heads`."""

    intermediate_size: int | None = None
    """Width of the feed-forward layer; unset means 4 x `hidden_size`."""

    max_positions: int = 2048
    """Longest context the released model accepts, in tokens."""

    rope_theta: float = 10000.0
    """Base of the rotary embedding (`llama`)."""

    tie_embeddings: bool = False
    """Use one matrix for the input embedding and the output head."""

    def __post_init__(self) -> None:
        require(
            self.path is None or self.family == "auto",
            f"model.path={self.path!r} does not go with model.family={self.family!r}: a path is "
            "used for `auto` and nothing else",
        )
        for name in _SIZES:
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}={value} must be at least 1")
        require(
            0.0 < self.rope_theta < math.inf,
            f"model.rope_theta={self.rope_theta} must be positive and finite",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of "
            f"model.num_heads={self.num_heads}",
        )
        require(
            self.num_heads % (self.num_kv_heads or self.num_heads) == 0,
            f"model.num_heads={self.num_heads} is not a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The packed tokens and their order."""

    store: dict[str, float] | str = "tokenized_data/demo"
    """Folder written by pmp-ds prepare-data; or a mixture of several, each with its weight:
    {FOLDER: WEIGHT, FOLDER: WEIGHT}."""

    separate_documents: bool = False
    """Keep the documents in a block apart (`llama` and `gpt2`): positions start again after each
    end-of-text token, attention does not cross it, and no loss is taken of what follows it. Off,
    as in the paper, a block is one text."""

    seed: int = 0
    """Seed of the sample order of masked pretraining (discovery draws its own, secret order)."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"data.seed={self.seed} must be between 0 and 2^63 - 1")
        check_store(self.store)


def check_store(store: dict[str, float] | str) -> None:
    """Raise UserError unless ``data.store`` names a folder or a mixture."""
    if isinstance(store, str):
        require(
            not store.startswith(("{", "[")) and store != "",
            f"data.store={store} is neither a folder nor a mixture: write "
            "{FOLDER: WEIGHT, FOLDER: WEIGHT} with numbers for the weights, each folder once",
        )
        return
    require(len(store) > 0, "data.store={} names no folder")
    for folder, weight in store.items():
        require(
            0.0 < weight < float("inf"),
            f"data.store: the weight of {folder} is {weight}; it must be positive",
        )
