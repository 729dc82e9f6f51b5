"""The plan of a run, printed for the user before any expensive step."""

from typing import Any

from pmp_ds import dist
from pmp_ds.config import Config
from pmp_ds.config.moments import moments_of
from pmp_ds.config.precision import precision_of
from pmp_ds.data.loader import order_key
from pmp_ds.data.mixture import realised
from pmp_ds.engine.cut import Cut
from pmp_ds.engine.deepspeed_config import master_of, zero_stage
from pmp_ds.model.parameters import num_params
from pmp_ds.optim.rules import rule_of
from pmp_ds.ticket.ticket import exact_k, load_ticket
from pmp_ds.train.job import Job, given_ticket

_MASKS = {
    "earlybird": "early-bird ticket, discovery of at most {mask.max_steps:,} updates",
    "random": "random mask from a secret key",
    "none": "none: every parameter is trained (BASE)",
    "file": "ticket of {mask.file}",
}


def describe(job: Job) -> str:
    """Return batch arithmetic, parameters, memory per rank and output folders; no mask content."""
    config, world = job.config, dist.world_size()
    train, mask = config.train, config.mask
    ranks = dist.ranks_in_words()
    d = num_params(job.table)
    k = d if mask.source == "none" else exact_k(mask.density, d)
    if (folder := given_ticket(config, job.run)) is not None:
        k = load_ticket(folder).mask.num_kept
    cut = Cut.of(train, world)
    tokens = train.global_batch_size * job.store.block_size
    divided = cut.in_words()
    if train.micro_batch_size == "auto":
        divided = f"{train.global_batch_size} sequences, as many at once as fit (measured below),"
    rows = {
        "batch": f"{divided} x {job.store.block_size} tokens = {tokens:,} tokens per update"
        + cut.unused,
        "updates": f"{train.steps:,}, {train.steps * tokens:,} tokens, "
        + _epochs(job, train.steps * train.global_batch_size),
        "parameters": f"d = {d:,}",
        "mask": _MASKS[mask.source].format(mask=mask),
        "ticket": f"k = {k:,} of {d:,}, density {k / d:.4f}",
        "engine": f"DeepSpeed ZeRO {zero_stage(job.ds_config)}, {ranks}, {train.precision}, "
        f"{dist.device().type}",
        "memory": _memory(config, job.ds_config, d, k, world),
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


def _memory(config: Config, ds_config: dict[str, Any], d: int, k: int, world: int) -> str:
    """Return the model states per rank, without activations and padding."""
    stage = zero_stage(ds_config)
    precision = precision_of(config.train)
    element = precision.num_bytes
    weights = element * d / (world if stage >= 3 else 1)
    gradients = element * d / (world if stage >= 2 else 1)
    share = world if stage >= 1 else 1
    masters = {"dense": 4 * d, "compact": 4 * k, "split": 2 * k}
    in_weights = not precision.has_master and stage == 0
    master = 0 if in_weights else masters[master_of(ds_config)] / share
    count, stored = len(rule_of(config.train).moments), moments_of(config.train)
    moments, dense = (count * stored.num_bytes(k, d) + d / 8) / share, count * 4 * d / share
    mb = 1e6
    return (
        f"per rank {(weights + gradients + master + moments) / mb:,.1f} MB of model states: "
        f"weights {weights / mb:,.1f}, gradients {gradients / mb:,.1f}, master "
        f"{master / mb:,.1f}, moments and mask {moments / mb:,.1f} (dense fp32 moments "
        f"{dense / mb:,.1f})"
    )
