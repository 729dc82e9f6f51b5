"""The end of a run in words, counted again from its files."""

from collections.abc import Mapping
from typing import Any

from pmp_ds.config import Config
from pmp_ds.data.loader import order_key
from pmp_ds.data.mixture import realised
from pmp_ds.errors import quoted
from pmp_ds.log import read_metrics
from pmp_ds.model.parameters import num_params
from pmp_ds.release.export import generate_sample
from pmp_ds.run_dir import RunDir
from pmp_ds.state import plain_weights, theta0
from pmp_ds.state.run_record import DataFacts, load_config, read_data
from pmp_ds.ticket.ticket import Ticket, exact_k, has_ticket, load_ticket


def summarize(run: RunDir, prompt: str) -> str:
    """Return ``rows_of`` as text."""
    return in_lines(rows_of(run, prompt))


def in_lines(rows: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<12}{text}" for name, text in rows.items())


def rows_of(run: RunDir, prompt: str) -> dict[str, str]:
    """Return what a run came to, by name of the row; the sample needs a release. Raises UserError
    when ``run`` is not a run or has no checkpoint."""
    config, data = load_config(run), read_data(run)
    records = read_metrics(run.metrics)
    weights = plain_weights.of_checkpoint(run, None)
    initial = theta0.initial_of(run, theta0.init_of(run, config))
    d = num_params(initial.table)
    rows = {
        "data": f"{data.documents:,} documents, {data.tokens:,} tokens in "
        f"{data.tokens // data.block_size:,} blocks of {data.block_size}",
        "parameters": f"d = {d:,}",
    }
    if data.parts:
        rows["mixture"] = _mixture(config, data, weights.updates)
    if has_ticket(run.ticket):
        ticket = load_ticket(run.ticket)
        kept = ticket.mask.num_kept
        k = exact_k(ticket.density, d)
        rows |= {
            "ticket": f"k = {k:,}, ones counted in the ticket {kept:,} "
            f"({'equal' if kept == k else 'NOT EQUAL'})",
            "drawn": _drawn(ticket, records),
            "complement": f"init.weights={config.init.weights} does not exist: not counted"
            if initial.is_gone
            else f"{plain_weights.complement_changes(weights, initial, ticket.mask):,} of "
            f"{d - kept:,} elements changed in {weights.updates:,} updates",
        }
    else:
        rows["ticket"] = "none: every parameter was trained"
    rows |= _losses(records, data.unigram_cross_entropy)
    rows["pictures"] = ", ".join(str(p) for p in sorted(run.plots.glob("*.png"))) or "none"
    if run.release.is_dir():
        files = ", ".join(sorted(p.name for p in run.release.iterdir()))
        rows["release"] = f"{run.release}/: {files}"
        rows["sample"] = repr(generate_sample(run.release, prompt, seed=0))
    else:
        rows["release"] = f"none yet: pmp-ds export --run {quoted(run.root)}"
    return rows


def _mixture(config: Config, data: DataFacts, updates: int) -> str:
    """Return how many samples every store contributed, one line each."""
    samples = updates * config.train.global_batch_size
    key = order_key("train", config.data.seed)
    counts = realised([part.slots for part in data.parts], samples, key)
    return f"\n{'':14}".join(
        f"{count:,} of {samples:,} samples ({count / max(1, samples):.2%}, asked {part.share:.2%}) "
        f"from {part.folder}"
        for part, count in zip(data.parts, counts, strict=True)
    )


def _drawn(ticket: Ticket, records: list[dict[str, Any]]) -> str:
    if ticket.step is None:
        return f"{ticket.source}, without discovery"
    ious = [r["iou"] for r in records if r["phase"] == "discover" and "iou" in r]
    trace = " ".join(f"{iou:.3f}" for iou in ious)
    stable = "stable" if ticket.stable else "NOT STABLE"
    return f"after update {ticket.step} of discovery, {stable}; IoU from update 2 on: {trace}"


def _losses(records: list[dict[str, Any]], unigram: float) -> dict[str, str]:
    rows = {}
    for label, name in (("training", "loss"), ("validation", "val_loss")):
        values = [float(r[name]) for r in records if r["phase"] == "train" and name in r]
        if values:
            rows[label] = (
                f"{values[0]:.3f} -> {values[-1]:.3f} nats per token (token frequencies alone: "
                f"{unigram:.3f})"
            )
    return rows
