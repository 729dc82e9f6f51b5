"""A run folder's record of its configuration and data, and the facts that export may read."""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pmp_ds import formats
from pmp_ds.cli import dump, parse
from pmp_ds.config import Config
from pmp_ds.config.schedules import SCHEDULES
from pmp_ds.data.mixed_store import Dataset, Part
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.log import read_metrics
from pmp_ds.optim.schedule import first_change, in_words
from pmp_ds.run_dir import RunDir, read_json, write_json, write_text
from pmp_ds.state import shelf
from pmp_ds.ticket.ticket import MANIFEST_FILE as TICKET_FILE
from pmp_ds.version import UNKNOWN, code_version

_BEGUN = "# begun with "

MAY_CHANGE = {
    "run",
    "guard",
    "data.store",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.profile",
}
"""Sections and settings that may change when a run resumes; stores are compared by content.
``_on_schedule`` decides when a run may change its length."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The run's view of its token store or mixture of stores; saved as data.json."""

    dataset_id: str
    vocab_size: int
    eos_id: int
    block_size: int
    unigram_cross_entropy: float
    documents: int
    tokens: int
    sources: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    """The stores of a mixture; empty for a single store."""
    bos_id: int | None = None
    """The token at the start of every document, if any."""

    @classmethod
    def of(cls, store: Dataset) -> "DataFacts":
        manifests = [part.manifest for part in store.stores]
        splits = [split for m in manifests for split in m["splits"].values()]
        return cls(
            dataset_id=store.dataset_id,
            vocab_size=store.vocab_size,
            eos_id=store.eos_id,
            bos_id=store.bos_id,
            block_size=store.block_size,
            unigram_cross_entropy=store.unigram_cross_entropy,
            documents=sum(split["documents"] for split in splits),
            tokens=sum(split["blocks"] for split in splits) * store.block_size,
            sources=tuple(
                one["input"] for m in manifests for one in m.get("settings", {}).get("input", ())
            ),
            parts=store.parts,
        )


def claim(run: RunDir, config: Config, store: Dataset) -> None:
    """Claim ``run`` for this configuration, or check that it has it. Rank 0 alone calls it.

    A claimed folder is not changed here: ``record_start`` does that, once nothing can refuse the
    start. Raises UserError that lists all differences outside ``MAY_CHANGE``.
    """
    data = DataFacts.of(store)
    if not run.config.exists():
        _require_new(run)
    else:
        saved = load_config(run)
        may_change = set(MAY_CHANGE)
        if None not in (saved.init.weights, config.init.weights):
            may_change.add("init.weights")  # compared by content
        differences = differing(saved, _on_schedule(run, saved, config), may_change)
        if (before := read_data(run)).dataset_id != data.dataset_id:
            differences += _data_differences(before.parts, data.parts) or [
                f"data.store: {config.data.store} contains other data than the run's"
            ]
        if differences:
            raise UserError(
                f"{run.root} contains a run with another configuration; repeat it with --config "
                f"{run.config}, or choose another run.name. Differences (the run's, yours):\n  "
                + "\n  ".join(differences)
            )
        return
    try:
        _write(run, config, data, store)
    except OSError as error:
        raise _not_writable(run, config, error) from None


def record_start(run: RunDir, config: Config) -> None:
    """Write config.yaml with ``config`` and the code versions that began the run and started it
    last. Rank 0 alone calls it."""
    try:
        run.create()
        write_text(run.config, headed(run.config, dump(config)))
    except OSError as error:
        raise _not_writable(run, config, error) from None


def headed(path: Path, text: str) -> str:
    """Return ``text`` under comment lines naming the code that began and last wrote ``path``."""
    first, now = f"{_BEGUN}{code_version()}", code_version()
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        first = next((line for line in lines if line.startswith(_BEGUN)), f"{_BEGUN}{UNKNOWN}")
    return f"{first}\n# last started with {now}\n{text}"


def _not_writable(run: RunDir, config: Config, error: OSError) -> UserError:
    return UserError(
        f"run.root={config.run.root}: the run's folder {run.root} cannot be written: {error}"
    )


def _require_new(run: RunDir) -> None:
    """Raise UserError for a run's folder without its config.yaml, which would otherwise resume with
    other settings unnoticed."""
    if not run.root.is_dir():
        return
    made = [path for path in (run.ticket / TICKET_FILE, run.ledger, run.metrics) if path.exists()]
    made += [run.checkpoints] if shelf.has_any(run) else []
    if made:
        raise UserError(
            f"{run.config} is missing, but {made[0]} is a run's: restore it from a backup, or "
            "choose another run.name"
        )


def _data_differences(saved: Sequence[Part], given: Sequence[Part]) -> list[str]:
    """Return the differences between two mixtures; empty if one of them is a single store."""
    if not (saved and given):
        return []
    before, now = ({part.dataset_id: part for part in parts} for parts in (saved, given))
    found = [f"data.store: {before[i]}, not given" for i in before if i not in now]
    found += [f"data.store: not in the run, {now[i]}" for i in now if i not in before]
    return found + [
        f"data.store, share of {now[i]}: {before[i].share:.4f}, {now[i].share:.4f}"
        for i in now
        if i in before and before[i].slots != now[i].slots
    ]


def _write(run: RunDir, config: Config, data: DataFacts, store: Dataset) -> None:
    run.create()
    if not run.tokenizer.exists():
        aside = run.tokenizer.with_suffix(".incomplete")
        shutil.copytree(store.tokenizer_dir, aside, dirs_exist_ok=True)
        aside.rename(run.tokenizer)
    write_json(run.data, asdict(data) | {"format_version": formats.current("data")})
    text = headed(run.config, dump(config))
    write_text(run.config, text)  # written last: it claims the folder


def differing(saved: Any, given: Any, may_change: Collection[str]) -> list[str]:
    """Return `SECTION.NAME: SAVED, GIVEN` for each setting in which two configurations of one type
    differ, outside the sections and settings named by ``may_change``."""
    return differing_settings(asdict(saved), asdict(given), may_change)


def differing_settings(
    saved: dict[str, Any], given: dict[str, Any], may_change: Collection[str]
) -> list[str]:
    """Do the same for settings as dicts, as a file has them."""
    before, now = _flat(saved), _flat(given)
    return [
        f"{name}: {before.get(name)!r}, {value!r}"
        for name, value in now.items()
        if before.get(name) != value and not {name, name.partition(".")[0]} & set(may_change)
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by `SECTION.NAME`, or by name alone if they are in no section."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        within = value.items() if isinstance(value, dict) else ()
        flat |= {f"{name}.{key}": inner for key, inner in within} if within else {name: value}
    return flat


def _on_schedule(run: RunDir, saved: Config, given: Config) -> Config:
    """Return ``given`` with the run's own length where a new length is allowed: a `wsd` run may be
    extended, or begin its decay, if no past learning rate changes. Raises UserError otherwise."""
    before, now = saved.train, given.train
    own = replace(now, steps=before.steps, decay_steps=before.decay_steps)
    if own == now or not SCHEDULES[before.schedule].stable:
        return given
    explored = (one["step"] for one in read_metrics(run.metrics) if one["phase"] == "discover")
    done = max(shelf.last_step(run), *explored, 0)
    change = first_change(before, now, done)
    if change is not None or now.steps < shelf.last_step(run):
        raise UserError(
            f"train.steps={now.steps} and train.decay_steps={now.decay_steps} do not continue "
            f"{run.root}: with its train.steps={before.steps} and train.decay_steps="
            f"{before.decay_steps} it has done {done:,} updates, and update {change or done:,} "
            f"would have had another learning rate or none. Begin the decay after update {done:,}"
        )
    return replace(given, train=own)


def load_config(run: RunDir) -> Config:
    """Return the resolved configuration of a run."""
    if not run.config.exists():
        raise UserError(f"{run.root} is not a run: it has no {run.config.name}")
    config, _ = parse(Config, ["--config", str(run.config)])
    return config


def read_data(run: RunDir) -> DataFacts:
    values = read_json(run.data)
    version = fit(int, values.pop("format_version", 1), f"{run.data}: format_version")
    formats.require("data", run.data, version, way_out="use that version")
    try:
        facts: DataFacts = fit(DataFacts, values, run.data)
    except UserError as error:
        raise UserError(f"{error}: restore it from a backup") from None
    return facts


def export_facts(run: RunDir, step: int, val_loss: float | None) -> dict[str, Any]:
    """Return a model card's facts on the weights after ``step`` updates; nothing on the mask."""
    config, data = load_config(run), read_data(run)
    train = config.train
    secrecy = "secret" if config.init.seed is None else "public"
    if config.init.weights is not None:
        secrecy = "given"
    if config.mask.source == "none":
        secrecy = "none"
    return {
        "name": config.run.name,
        "secrecy": secrecy,
        "updates": step,
        "tokens": step * train.global_batch_size * data.block_size,
        "global_batch_size": train.global_batch_size,
        "block_size": data.block_size,
        "schedule": in_words(train),
        "val_loss": val_loss,
        "dataset_sources": data.sources,
        "data_description": (
            f"{data.documents:,} documents, {data.tokens:,} tokens, packed into blocks of "
            f"{data.block_size} tokens separated by the end-of-text token"
            + (", each document read separately" if config.data.separate_documents else "")
        ),
    }
