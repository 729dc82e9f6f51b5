"""The inputs of a run (settings, data, theta(0)) and checks that they fit together."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.loader import order_key
from pmp_ds.data.mixed_store import Dataset
from pmp_ds.engine.objective import NextToken
from pmp_ds.errors import UserError, quoted
from pmp_ds.model.attention import plain_attention
from pmp_ds.model.folder import open_tokenizer
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import derive
from pmp_ds.model.parameters import ParamInfo
from pmp_ds.run_dir import RunDir
from pmp_ds.state import theta0
from pmp_ds.state.manifest import Phase
from pmp_ds.state.run_record import DataFacts
from pmp_ds.ticket.scores import find_score
from pmp_ds.ticket.ticket import Ticket, has_ticket, load_ticket
from pmp_ds.train.session import Measure, Work

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Job:
    """The inputs shared by all parts of a run."""

    config: Config
    ds_config: dict[str, Any]
    run: RunDir
    store: Dataset
    init: theta0.Init
    initial: Initial
    theta0_digest: str = ""

    @property
    def table(self) -> tuple[ParamInfo, ...]:
        return self.initial.table

    def key(self, purpose: str) -> bytes:
        """Return 32 bytes derived from the secret, or from the public seed in paper mode."""
        if isinstance(self.init, bytes):
            return derive(self.init, purpose)
        return order_key(purpose, self.init)

    def warm_up_order(self) -> int | bytes:
        """Return the seed or key of discovery's sample order, as secret as theta(0)."""
        return derive(self.init, "warm-up order") if isinstance(self.init, bytes) else self.init

    def work(
        self,
        phase: Phase,
        order: int | bytes,
        steps: int,
        ticket: Ticket | None = None,
        measure: Measure | None = None,
    ) -> Work:
        """Return a phase from theta(0): ``steps`` updates on the ticket (None: dense), with the
        samples in the ``order`` of a seed or secret."""
        separate, model = self.config.data.separate_documents, self.initial.model()
        if not separate:
            model = plain_attention(model, self.store.block_size)
        return Work(
            phase=phase,
            name=phase,
            model=model,
            fill=None if self.initial.reason else self.initial.read,
            mask=ticket.mask if ticket else None,
            mask_id=ticket.id if ticket else None,
            objective=NextToken(self.store.eos_id if separate else None),
            samples=self.store.split("train"),
            order=order_key(phase, order),
            dataset_id=self.store.dataset_id,
            tokens_per_sample=self.store.block_size,
            steps=steps,
            measure=measure,
        )


def check(config: Config, store: Dataset, run: RunDir) -> None:
    """Raise UserError unless model, data and a given ticket fit together; write nothing."""
    data = DataFacts.of(store)
    theta0.base_of(config, architecture(config, store, run))
    if config.init.weights is not None and not theta0.is_known(run):
        _require_same_tokenizer(Path(config.init.weights), config, store)
    find_score(config.mask.score)
    folder = given_ticket(config, run)
    if folder is not None and os.environ.get("RANK", "0") == "0":  # which alone reads it later
        load_ticket(folder, model_digest=theta0.model_digest(config, data, run))


def architecture(config: Config, store: Dataset, run: RunDir) -> PreTrainedConfig:
    """Return the model's Hugging Face config. Raises UserError when it does not fit the data."""
    return theta0.architecture(config, DataFacts.of(store), run)


def _require_same_tokenizer(base: Path, config: Config, store: Dataset) -> None:
    """Raise UserError unless the ids of the data are those of the base, if it has a tokenizer."""
    if not all((folder / _TOKENIZER).is_file() for folder in (base, store.tokenizer_dir)):
        return
    theirs, ours = (open_tokenizer(folder).get_vocab() for folder in (base, store.tokenizer_dir))
    if theirs != ours:
        raise UserError(
            f"data.store={config.data.store} was tokenized with another tokenizer than that of "
            f"init.weights={base}: prepare it with --tokenizer {quoted(base)}"
        )


def given_ticket(config: Config, run: RunDir) -> Path | None:
    """Return the ticket folder of ``mask.source: file``: the run's own copy if there is one."""
    if config.mask.file is None:
        return None
    return run.ticket if has_ticket(run.ticket) else Path(config.mask.file)


def open_job(config: Config, ds_config: dict[str, Any], store: Dataset, run: RunDir) -> Job:
    """Describe theta(0); on a resumed run, check that it is the same as before. Collective.

    Writes nothing except the key of a new run.
    """
    init = theta0.init_of(run, config, may_create=True)

    def described() -> Initial:
        hf_config = architecture(config, store, run)
        return Initial(hf_config, init, theta0.base_of(config, hf_config))

    initial = dist.together(described, patient=True)
    gone = dist.all_gather_object(initial.is_gone)
    if initial.base is not None and any(gone) and not all(gone):
        base = initial.base
        dist.together(lambda: base.require("other ranks have it"))
    digest = theta0.check_together(run, initial)
    return Job(config, ds_config, run, store, init, initial, digest)
