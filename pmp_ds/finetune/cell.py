"""Run one fine-tuning in its own run folder, from start to result; resumes after a stop.

runs/NAME/config.yaml  metrics.jsonl  tensorboard/
runs/NAME/private/checkpoints/    while it runs
runs/NAME/private/model/          the fine-tuned model: as secret as the ticket used for it
"""

import contextlib
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmp_ds import dist, results
from pmp_ds.cli import dump, parse
from pmp_ds.config import Config
from pmp_ds.data.loader import order_key
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import UserError
from pmp_ds.finetune.config import FinetuneConfig
from pmp_ds.finetune.method import METHODS
from pmp_ds.finetune.methods import load_model, mask_of, open_ticket
from pmp_ds.finetune.tasks import LM, Metrics, Task
from pmp_ds.log import read_metrics
from pmp_ds.model.folder import open_tokenizer
from pmp_ds.results import Result
from pmp_ds.run_dir import RunDir, make_private, write_text
from pmp_ds.state import shelf, weight_files
from pmp_ds.state.run_record import differing, headed
from pmp_ds.state.shelf import Found, Survey
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.train import start
from pmp_ds.train.loop import train
from pmp_ds.train.session import Session, Work
from pmp_ds.watch.watch import Watch


@dataclass(frozen=True)
class Tuned:
    """A model to train, the same on every rank."""

    model: Any  # PreTrainedModel, possibly inside peft's
    mask: ParamMask | None  # None: all trainable elements
    mask_id: str | None


def _tuned(config: FinetuneConfig, task: Task) -> Tuned:
    ticket = open_ticket(config)
    model = load_model(config, task.num_labels)
    return Tuned(model, *mask_of(config, ticket, model))


def settings_of(config: FinetuneConfig, task: Task, ticket_id: str | None) -> dict[str, Any]:
    """Return the settings that a result depends on besides weights, `seed` and `lr`; ``ticket_id``:
    of a method that needs a ticket."""
    data = asdict(config.data)
    settings: dict[str, Any] = {
        "task": config.task,
        "method": config.method,
        "seed": config.seed,
        "scratch": config.scratch,
        **config.train.facts(),
        "data": task.digest,
    }
    if config.task == LM:
        settings["val_blocks"] = config.run.val_blocks
    else:
        settings |= {"max_train": data["max_train"], "max_length": data["max_length"]}
    method = METHODS[config.method]
    if method.needs_ticket:
        assert ticket_id is not None
        settings["ticket"] = results.mark(ticket_id)
    return settings | {n: fact(config) for n, fact in method.facts.items()}


def tune(
    config: FinetuneConfig,
    ds_config: dict[str, Any],
    task: Task,
    run: RunDir,
    watch: Watch,
    *,
    digest: str,  # of the model
    keep_model: bool,
    start_afresh: bool = False,
) -> Result:
    """Run or resume a cell to its end; the caller stores the result. Collective.

    With ``start_afresh`` unreadable checkpoints are set aside. Raises Stopped on a stop request.
    """
    began = time.monotonic()
    dist.on_rank0(lambda: _check_settings(run, config))
    loop = config.loop_config(len(task.samples), dist.world_size())
    tuned = dist.together(lambda: _tuned(config, task))
    seen = _look(run, task, tuned, start_afresh)
    dist.on_rank0(lambda: _claim(run, config, seen))  # the first write of this start
    with Session(run, loop, ds_config, watch) as session:
        metrics, trained = _train(config, task, tuned, seen.found, session)
    if keep_model:
        dist.on_rank0(lambda: _keep(config, run, task))
    curve = dist.on_rank0(lambda: _curve(run, task, loop))
    steps = loop.train.steps
    return Result(
        kind="finetune",
        arm=config.arm or results.arm_of(config.model),
        model=config.model,
        model_digest=digest,
        settings=settings_of(config, task, tuned.mask_id),
        values={
            "metrics": metrics,
            "majority": task.majority,
            "primary": task.primary,
            "curve": curve,
            "trainable": trained,
            "examples": steps * loop.train.global_batch_size,
            "tokens": round(steps * loop.train.global_batch_size * task.tokens_per_sample),
        },
        seconds=time.monotonic() - began,
        hardware=f"{results.hardware()}, {dist.ranks_in_words()}",
    )


_MAY_CHANGE = {
    "run",
    "guard",
    "results",
    "arm",
    "ticket",
    "identity",
    "passphrase_file",
    "train.micro_batch_size",
}


def _check_settings(run: RunDir, config: FinetuneConfig) -> None:
    """Raise UserError that lists the differences if ``run`` has another configuration."""
    if run.config.exists():
        saved, _ = parse(FinetuneConfig, ["--config", str(run.config)])
        if differences := differing(saved, config, _MAY_CHANGE):
            raise UserError(
                f"{run.root} contains a fine-tuning with other settings; choose another run.name. "
                "Differences (its, yours):\n  " + "\n  ".join(differences)
            )


def _claim(run: RunDir, config: FinetuneConfig, seen: Survey) -> None:
    """Claim ``run`` for this configuration, in its state at the checkpoint found."""
    run.root.mkdir(parents=True, exist_ok=True)
    for folder in (run.private, run.checkpoints):
        make_private(folder)
    start.resume_in(run, seen.passed_over, {"train": seen.found[1].step} if seen.found else {})
    write_text(run.config, headed(run.config, dump(config)))


def _train(
    config: FinetuneConfig, task: Task, tuned: Tuned, found: Found | None, session: Session
) -> tuple[Metrics, int]:
    """Return the final metrics and the number of trained elements."""
    trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    if tuned.mask is not None:
        trainable = tuned.mask.num_kept
    latest: Metrics = {}

    def measure(engine: Engine) -> dict[str, float]:
        loss, metrics = task.measure(engine, session.config)
        latest.update(metrics)
        named = {f"{column}/{k}": v for column, row in metrics.items() for k, v in row.items()}
        return {"val_loss": loss, **named}

    work = Work(
        name="finetune",
        model=tuned.model,
        mask=tuned.mask,
        mask_id=tuned.mask_id,
        objective=task.objective,
        samples=task.samples,
        order=order_key("finetune", config.seed),
        dataset_id=task.digest,
        tokens_per_sample=task.tokens_per_sample,
        steps=session.config.train.steps,
        measure=measure,
    )
    with session.training(work, found) as training:
        train(training)
        if not latest:  # it was killed between its last checkpoint and its result
            measure(training.engine)
    return latest, trainable


def _look(run: RunDir, task: Task, tuned: Tuned, start_afresh: bool) -> Survey:
    """Find the newest intact checkpoint of this cell."""
    seen = dist.on_rank0(lambda: start.survey_or_afresh(run, "train", start_afresh))
    found = seen.found
    if found is None:
        return seen
    if (found[1].dataset_id, found[1].ticket_id) != (task.digest, tuned.mask_id):
        raise UserError(
            f"{run.root} was begun with other data or another ticket; restore them, or choose "
            "another run.name"
        )
    return seen


def _curve(run: RunDir, task: Task, loop: Config) -> list[list[float]]:
    """Return (tokens trained on, primary metric of the first column) at every validation."""
    column, metric = next(iter(task.primary.items()))
    per_update = loop.train.global_batch_size * task.tokens_per_sample
    name = f"{column}/{metric}"
    records = [r for r in read_metrics(run.metrics) if name in r]
    return [[round(r["step"] * per_update), float(r[name])] for r in records]


def _keep(config: FinetuneConfig, run: RunDir, task: Task) -> None:
    """Write the newest checkpoint's weights as a Hugging Face folder; for LoRA, the adapters."""
    found = shelf.find(run)
    assert found is not None
    folder = run.private / "model"
    aside = folder.with_name("model.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    make_private(aside)
    fresh = load_model(config, task.num_labels)
    weight_files.load_weights(found[0] / "weights", fresh)
    fresh.save_pretrained(aside)
    open_tokenizer(Path(config.model)).save_pretrained(aside)
    for path in aside.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def forget(run: RunDir) -> None:
    """Remove a finished cell's checkpoints."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        make_private(run.checkpoints)
