"""Jobs that need the ticket. Their values are sums over all of it, but still for its owner only."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pmp_ds.evaluate import gradients as gradients_
from pmp_ds.evaluate import landscape as landscape_
from pmp_ds.evaluate.jobs import Job, Text, Values
from pmp_ds.evaluate.perplexity import held_out, mean_loss
from pmp_ds.evaluate.subject import Read, Subject, mask_on, read_parameters
from pmp_ds.model.parameters import weights_digest
from pmp_ds.progress import Progress
from pmp_ds.results import mark
from pmp_ds.ticket.ticket import Ticket


def landscape(
    subject: Subject,
    text: Text,
    ticket: Ticket,
    name: str,
    alphas: Sequence[float],
    seeds: Sequence[int],
    tuned: Path | None,
) -> Job:
    subject.require_vocabulary(text.store)
    mask = mask_on(ticket.mask, subject.model, subject.folder)
    blocks = held_out(text.store, text.split, text.blocks)
    read = subject.reader()
    settings = text.settings | {
        "mask": name,
        "ticket": mark(ticket.id),
        "alphas": list(alphas),
        "seeds": list(seeds),
        "tuned": None,
    }
    tuned_read = None
    if tuned is not None:
        tuned_read = read_parameters(tuned, subject.model)
        settings["tuned"] = _digest(tuned_read, subject.model)

    def run() -> Values:
        before = weights_digest(subject.model)
        total = landscape_.num_evaluations(alphas, seeds, tuned is not None)
        with Progress("landscape", "point", total) as bar:

            def loss() -> float:
                return mean_loss(subject.model, blocks, text.batch_size)

            values = landscape_.landscape(
                subject.model, read, mask, loss, alphas, seeds, bar.update
            ) | {"loss": loss()}
            if tuned_read is not None:
                values["tuned"] = landscape_.along_tuning(
                    subject.model, read, tuned_read, mask, loss, bar.update
                )
        assert weights_digest(subject.model) == before, "the weights were not restored"
        return values

    return Job("landscape", settings, run, _landscape_words)


def _landscape_words(values: Values) -> str:
    """Return means over seeds, a row for each direction."""
    lines = [f"loss {values['loss']:.4f}; rows: mean loss at theta + alpha * delta"]

    def table(alphas: Sequence[float], rows: dict[str, Sequence[float]]) -> None:
        lines.append(f"    {'alpha':<22}" + "".join(f"{alpha:>9g}" for alpha in alphas))
        for name, losses in rows.items():
            lines.append(f"    {name:<22}" + "".join(f"{loss:>9.3f}" for loss in losses))

    means = {
        f"{kind}, {scale}": np.mean(values["directions"][kind][scale], axis=0)
        for scale in landscape_.SCALES
        for kind in landscape_.KINDS
    }
    table(values["alphas"], means)
    if tuned := values.get("tuned"):
        losses = {f"fine-tuning, {kind}": tuned["losses"][kind] for kind in landscape_.KINDS}
        table(tuned["alphas"], losses)
    return "\n".join(lines)


def gradients(subject: Subject, text: Text, ticket: Ticket, name: str) -> Job:
    subject.require_vocabulary(text.store)
    mask = mask_on(ticket.mask, subject.model, subject.folder)
    blocks = held_out(text.store, text.split, text.blocks)

    def run() -> Values:
        with Progress("gradients", "block", len(blocks)) as bar:
            gradients_.accumulate(subject.model, blocks, text.batch_size, bar.update)
        try:
            return gradients_.compare(subject.model, mask, subject.embeddings)
        finally:
            subject.model.zero_grad()

    def words(values: Values) -> str:
        outside = values["auc_outside_embeddings"]
        return (
            f"AUC of |gradient| {values['auc']:.3f}"
            + (f", outside embeddings {outside:.3f}" if outside is not None else "")
            + "".join(
                f"; {kind}: median {values['median'][kind]:.2e}, "
                f"zero {values['zeros'][kind] / values['elements'][kind]:.1%}"
                for kind in ("ticket", "complement")
            )
        )

    return Job("gradients", text.settings | {"mask": name, "ticket": mark(ticket.id)}, run, words)


def _digest(read: Read, model: nn.Module) -> str:
    """Return the sha256 (hex) of another folder's weights, as stored."""
    sha = hashlib.sha256()
    for name, _ in model.named_parameters():
        tensor = read(name).contiguous()
        sha.update(f"{name}{tensor.dtype}".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
