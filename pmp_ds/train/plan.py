"""The plan of a run, printed for the user before any expensive step."""

from collections.abc import Mapping
from pathlib import Path

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.data.loader import order_key
from pmp_ds.data.mixture import realised
from pmp_ds.model.parameters import num_params
from pmp_ds.optim.rules import rule_of
from pmp_ds.ticket.ticket import exact_k, load_ticket
from pmp_ds.train.budget import Budget
from pmp_ds.train.job import Job, given_ticket

_MASKS = {
    "earlybird": "early-bird ticket, discovery of at most {mask.max_steps:,} updates",
    "random": "random mask from a secret key",
    "none": "none: every parameter is trained (BASE)",
    "file": "ticket of {mask.file}",
}


def describe(job: Job) -> str:
    """Return batch arithmetic, parameters, memory per rank and output folders; no mask content."""
    config, d = job.config, num_params(job.table)
    shapes = {info.name: info.shape for info in job.table}
    kept = kept_of(config, d, given_ticket(config, job.run))
    budget = Budget(shapes, kept, config, job.ds_config, dist.world_size())
    rows = basics(budget, job.store.block_size, dist.device().type)
    rows["updates"] += f", {_epochs(job, config.train.steps * config.train.global_batch_size)}"
    rows |= {
        "memory": _memory(budget),
        "secrecy": _secrecy(config),
        "writes": f"{job.run.root}/ (metrics, plots), {job.run.private}/ (ticket, checkpoints: "
        "secret)",
    }
    if (reason := job.initial.reason) is not None:
        rows["theta(0)"] = f"whole on every rank, {4 * d / 1e6:,.0f} MB of host memory: {reason}"
    if job.initial.is_gone:
        rows["theta(0)"] = (
            f"init.weights={config.init.weights} does not exist: the run resumes from a "
            "checkpoint alone, but needs it at its end to count the complement"
        )
    return in_lines(rows)


def kept_of(config: Config, d: int, given: Path | None) -> int:
    """Return k, the number of trained elements; ``given``: the ticket of ``mask.source: file``."""
    if given is not None:
        return load_ticket(given).mask.num_kept
    return d if config.mask.source == "none" else exact_k(config.mask.density, d)


def basics(budget: Budget, block_size: int, device: str) -> dict[str, str]:
    """Return what is trained with which batches, by name of the row; ``block_size`` in tokens."""
    train, mask, cut = budget.config.train, budget.config.mask, budget.cut
    d, k, tokens = budget.num_params, budget.kept, train.global_batch_size * block_size
    divided = cut.in_words()
    if train.micro_batch_size == "auto":
        divided = f"{train.global_batch_size} sequences, as many at once as fit (measured below),"
    ranks = f"{budget.world} rank{'s' if budget.world > 1 else ''}"
    return {
        "batch": f"{divided} x {block_size} tokens = {tokens:,} tokens per update{cut.unused}",
        "updates": f"{train.steps:,}, {train.steps * tokens:,} tokens",
        "parameters": f"d = {d:,}",
        "mask": _MASKS[mask.source].format(mask=mask),
        "ticket": f"k = {k:,} of {d:,}, density {k / d:.4f}",
        "engine": f"DeepSpeed ZeRO {budget.stage}, {ranks}, {train.precision}, {device}",
    }


def in_lines(rows: Mapping[str, str]) -> str:
    """Return the rows as text, their names in a column."""
    return "\n".join(f"  {name:<11}{text}" for name, text in rows.items())


def _secrecy(config: Config) -> str:
    if config.init.weights is not None:
        return (
            "theta(0) from init.weights: whoever else has these weights can compute the mask from "
            "the release"
        )
    if config.init.seed is not None:
        return "NONE: theta(0) from the public seed init.seed, anyone can compute the mask"
    return "theta(0) from a secret key"


def _epochs(job: Job, samples: int) -> str:
    """Return how often the blocks are read, for each store of a mixture."""
    if not job.store.parts:
        blocks = len(job.store.split("train"))
        return f"{samples / blocks:.2f} epochs of {blocks:,} blocks"
    key = order_key("train", job.config.data.seed)
    counts = realised([part.slots for part in job.store.parts], samples, key)
    return "a mixture of\n" + "\n".join(
        f"{'':13}{part.share:.2%} {part.folder}: {count / len(store.split('train')):.2f} epochs of "
        f"{len(store.split('train')):,} blocks"
        for part, store, count in zip(job.store.parts, job.store.stores, counts, strict=True)
    )


def _memory(budget: Budget) -> str:
    """Return the model states per rank, without activations."""
    found = {name: size / 1e6 for name, size in budget.states().items()}
    count = len(rule_of(budget.config.train).moments)
    return (
        f"per rank {sum(found.values()):,.1f} MB of model states: "
        f"weights {found['weights']:,.1f}, gradients {found['gradients']:,.1f}, master "
        f"{found['master weights']:,.1f}, moments and mask {found['moments'] + found['mask']:,.1f} "
        f"(dense fp32 moments {count * 4 * budget.local / 1e6:,.1f})"
    )
