"""Tasks for fine-tuning: GLUE classification, or plain text."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.mixed_store import open_data
from pmp_ds.data.verified import check_together
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.objective import NextToken, Objective
from pmp_ds.errors import UserError, quoted
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.rows import Classification, EncodedRows
from pmp_ds.glue.metrics import majority, score
from pmp_ds.glue.read import Rows, load
from pmp_ds.glue.tasks import find_task
from pmp_ds.model.build import context_length
from pmp_ds.model.classifier import pad_id
from pmp_ds.model.folder import open_tokenizer, read_config
from pmp_ds.run_dir import RunDir
from pmp_ds.train.loop import validate

LM = "lm"
Metrics = dict[str, dict[str, float]]
"""Metric by name, by column of the results' tables."""


class Task(Protocol):
    """Samples, an objective, and metrics on held-out data."""

    samples: Any  # read by data.loader.BlockLoader
    objective: Objective
    num_labels: int | None
    """Outputs of the head; None: the language model without one."""
    digest: str
    """Identifies the data, training and held-out."""
    tokens_per_sample: float
    primary: dict[str, str]
    """The primary metric, by column."""
    majority: Metrics
    """The scores of a constant prediction."""

    def measure(self, engine: Engine, config: Config) -> tuple[float, Metrics]:
        """Return the mean loss on held-out data, and the metrics. Collective."""
        ...


def open_task(config: FinetuneConfig) -> Task:
    """Read and encode the data of ``config.task``. Raises UserError for missing data."""
    return Text(config) if config.task == LM else Glue(config)


class Glue:
    """A task of GLUE with a classification head on the last token."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.task = find_task(config.task)
        folder = config.data.glue_dir
        data = load(self.task, Path(folder) if folder else None, config.data.max_train)
        hf_config, tokenizer = read_config(Path(config.model)), open_tokenizer(Path(config.model))
        try:
            padding = pad_id(hf_config)
        except UserError as error:
            raise UserError(f"--model {config.model}: its {error}") from None
        longest = min(config.data.max_length, context_length(hf_config))

        def encode(rows: Rows) -> EncodedRows:
            return EncodedRows(rows, tokenizer, max_length=longest, pad_id=padding)

        self.samples = encode(data.train)
        self.objective: Objective = Classification()
        self.num_labels: int | None = self.task.num_outputs
        self.tokens_per_sample = float(self.samples.lengths.mean())
        self._validation = {column: encode(rows) for column, rows in data.validation.items()}
        self._labels = {column: rows.labels for column, rows in data.validation.items()}
        self.digest = " ".join(r.sha256[:16] for r in (data.train, *data.validation.values()))
        self.primary = dict.fromkeys(data.validation, self.task.primary)
        self.majority = {
            column: majority(self.task, data.train.labels, labels)
            for column, labels in self._labels.items()
        }

    def measure(self, engine: Engine, config: Config) -> tuple[float, Metrics]:
        metrics, losses = {}, []
        for column, rows in self._validation.items():
            logits = predict(engine, rows)
            batch = torch.from_numpy(rows.gather(np.arange(len(rows))))
            losses.append(float(self.objective.losses(torch.from_numpy(logits), batch).mean()))
            outputs = logits[:, 0] if self.task.is_regression else logits
            metrics[column] = score(self.task, outputs, self._labels[column])
        return float(np.mean(losses)), metrics


class Text:
    """Next-token prediction on packed text."""

    def __init__(self, config: FinetuneConfig) -> None:
        assert config.data.store is not None
        store = open_data(config.data.store)
        _same_tokenizer(config, store.tokenizer_dir)
        check_together(store, RunDir(Path(config.run.root) / config.run.name).verified)
        self.samples = store.split("train")
        self._validation = store.split("validation")
        self.objective: Objective = NextToken()
        self.num_labels: int | None = None
        self.digest = store.dataset_id
        self.tokens_per_sample = float(store.block_size)
        self.primary, self.majority = {"LM": "loss"}, Metrics()

    def measure(self, engine: Engine, config: Config) -> tuple[float, Metrics]:
        loss = validate(engine, self._validation, config.run.val_blocks)
        return loss, {"LM": {"loss": loss}}


def _same_tokenizer(config: FinetuneConfig, of_store: Path) -> None:
    """Raise UserError unless every token has the same id in the model and in the store."""
    model, store = open_tokenizer(Path(config.model)), open_tokenizer(of_store)
    if model.get_vocab() != store.get_vocab():
        raise UserError(
            f"data.store={config.data.store} was tokenized for another model: prepare the text "
            f"with --tokenizer {quoted(config.model)}"
        )


def predict(engine: Engine, rows: EncodedRows) -> npt.NDArray[np.float32]:
    """Return the logits of every example, (n, num_labels), on every rank. Collective."""
    order = np.argsort(rows.lengths, kind="stable")  # similar lengths together reduce padding
    share = -(-len(order) // dist.world_size())
    mine = order[np.minimum(np.arange(share) * dist.world_size() + dist.rank(), len(order) - 1)]
    batch = torch.from_numpy(rows.gather(mine))
    parts = dist.all_gather_object((mine, engine.predict(batch).float().cpu().numpy()))
    logits = np.empty((len(order), parts[0][1].shape[1]), dtype=np.float32)
    for indices, values in parts:
        logits[indices] = values
    return logits
