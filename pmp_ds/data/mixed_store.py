"""The data of `data.store`: one store, or several with weights that training reads as one.

    store = open_data({"tokenized_data/web": 0.7, "tokenized_data/code": 0.3})

Order, validation blocks and dataset id of a mixture depend on its parts' contents and weights, not
on their folders or the order in which they are written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, overload

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.blocks import Blocks
from pmp_ds.data.loader import BlockSource, SampleSource
from pmp_ds.data.mixture import PERIOD, InTurn, Mixture, slots_of
from pmp_ds.errors import UserError, quoted


@dataclass(frozen=True, kw_only=True)
class Part:
    """One store of a mixture."""

    folder: str
    dataset_id: str
    slots: int
    """Number of its samples in every 65,536 of training."""

    @property
    def share(self) -> float:
        return self.slots / PERIOD

    def __str__(self) -> str:
        return f"{self.folder} (dataset {self.dataset_id[:12]})"


class Dataset(Protocol):
    """The data for training: a ``Store`` or a ``MixedStore``."""

    dataset_id: str
    block_size: int
    vocab_size: int
    eos_id: int
    bos_id: int | None
    unigram_cross_entropy: float
    tokenizer_dir: Path

    @property
    def stores(self) -> Sequence[Store]: ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stores of a mixture; empty for a single store."""
        ...

    @overload
    def split(self, name: Literal["train"]) -> BlockSource | SampleSource: ...

    @overload
    def split(self, name: Literal["validation"]) -> Blocks | InTurn: ...

    def verify(self) -> int: ...


class MixedStore:
    """Stores with weights, in the order of their dataset ids."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Open the stores of ``weights``, by folder. Raises UserError as ``open_data`` does."""
        opened = [(Store.open(folder), folder) for folder in weights]
        opened.sort(key=lambda pair: pair[0].dataset_id)
        self.stores = [store for store, _ in opened]
        _check_together(self.stores)
        names = [folder for _, folder in opened]
        slots = slots_of(names, [weights[name] for name in names])
        self.parts = tuple(
            Part(folder=name, dataset_id=store.dataset_id, slots=count)
            for name, store, count in zip(names, self.stores, slots, strict=True)
        )
        content = [(part.dataset_id, part.slots) for part in self.parts]
        self.dataset_id = hashlib.sha256(
            json.dumps(["mixture", PERIOD, content]).encode()
        ).hexdigest()
        """sha256 over the parts' dataset ids and shares."""
        self.unigram_cross_entropy = sum(
            part.share * store.unigram_cross_entropy
            for part, store in zip(self.parts, self.stores, strict=True)
        )
        """Nats per token of a model that knows only each part's token frequencies."""
        first = self.stores[0]
        self.block_size, self.vocab_size = first.block_size, first.vocab_size
        self.eos_id, self.bos_id = first.eos_id, first.bos_id
        self.tokenizer_dir = first.tokenizer_dir
        self._train = Mixture(names, [store.split("train") for store in self.stores], slots)
        self._validation = InTurn([store.split("validation") for store in self.stores], slots)

    @overload
    def split(self, name: Literal["train"]) -> Mixture: ...

    @overload
    def split(self, name: Literal["validation"]) -> InTurn: ...

    def split(self, name: str) -> Mixture | InTurn:
        """Return ``train``, or ``validation``: the parts' blocks in proportion to the weights, as
        far as they reach."""
        return self._train if name == "train" else self._validation

    def verify(self) -> int:
        """Call ``Store.verify`` for every part."""
        return sum(store.verify() for store in self.stores)


def open_data(setting: Mapping[str, float] | str) -> Dataset:
    """Return the store or the mixture of `data.store`.

    Raises UserError as ``Store.open`` does, for stores that cannot be combined, and for weights
    that are too small.
    """
    return Store.open(setting) if isinstance(setting, str) else MixedStore(setting)


def _check_together(stores: list[Store]) -> None:
    first = stores[0]
    for before, other in pairwise(stores):
        if before.dataset_id == other.dataset_id:
            raise UserError(
                f"data.store: {before.folder} and {other.folder} contain the same blocks; name one "
                "of them, with the sum of the weights"
            )
        if found := first.unlike(other):
            raise UserError(
                f"data.store: {first.folder} and {other.folder} cannot be mixed: "
                f"{'; '.join(found)}; prepare one of them again "
                f"(--tokenizer {quoted(first.tokenizer_dir)})"
            )
