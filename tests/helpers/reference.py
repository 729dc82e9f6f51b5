"""The whole method in plain, single-process PyTorch: what every sharding must agree with.

Written from the paper alone, with nothing of pmp_ds.ticket, pmp_ds.optim or pmp_ds.train: sort
instead of histograms, dense moments, one tensor after the other.
"""

import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from pmp_ds.config import MaskConfig, TrainConfig

Masks = dict[str, torch.Tensor]  # by parameter name, bool, in its shape
Batch = Callable[[int], torch.Tensor]  # update (from 1) -> (B, T) int64


def top_k(scores: dict[str, torch.Tensor], k: int, forced: set[str]) -> Masks:
    """Exactly k ones: `forced` whole, then the highest scores, ties by lowest global index."""
    flat = torch.cat([s.flatten().double().abs() for s in scores.values()])
    offset = 0
    for name, score in scores.items():
        if name in forced:
            flat[offset : offset + score.numel()] = math.inf
        offset += score.numel()
    order = torch.sort(flat, descending=True, stable=True).indices
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order[:k]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def iou(a: Masks, b: Masks) -> float:
    both = sum(int((a[n] & b[n]).sum()) for n in a)
    either = sum(int((a[n] | b[n]).sum()) for n in a)
    return both / either


class Trainer:
    """Masked AdamW with clipping, warm-up and cosine; ``masks`` None trains everything."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, masks: Masks | None) -> None:
        self.model, self.config, self.masks = model, config, masks
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.moments = {
            n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.params.items()
        }

    def gradients(self, batch: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        self.model.zero_grad()
        logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in self.params.items()}

    @torch.no_grad()
    def apply(self, grads: dict[str, torch.Tensor], step: int) -> float:
        c = self.config
        if self.masks is not None:
            grads = {n: g.masked_fill(~self.masks[n], 0.0) for n, g in grads.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        scale = min(1.0, c.clip_norm / (norm + 1e-6)) if c.clip_norm else 1.0
        if step <= c.warmup_steps:
            lr = c.lr * step / c.warmup_steps
        else:
            progress = (step - c.warmup_steps) / (c.steps - c.warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            lr = c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * cosine)
        assert c.betas is not None
        b1, b2 = c.betas
        for name, p in self.params.items():
            g = grads[name] * scale
            m, v = self.moments[name]
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
            decay = c.weight_decay if p.dim() >= 2 else 0.0
            new = p * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + c.eps)
            kept = torch.ones_like(p, dtype=torch.bool) if self.masks is None else self.masks[name]
            p.copy_(torch.where(kept, new, p))
        return norm


def discover(
    model: PreTrainedModel, train: TrainConfig, mask: MaskConfig, batch: Batch, k: int
) -> tuple[Masks, int, list[float]]:
    """The ticket, the update that drew it, and the IoU trace."""
    forced = {
        n for n, p in model.named_parameters() if mask.always_train and bool((p == p.max()).all())
    }
    trainer = Trainer(model, train, None)
    total: dict[str, torch.Tensor] = {}
    previous: Masks | None = None
    trace: list[float] = []
    streak = 0
    for step in range(1, mask.max_steps + 1):
        _, grads = trainer.gradients(batch(step))
        for name, g in grads.items():
            if mask.score == "mean":
                total[name] = total.get(name, torch.zeros_like(g)) + g.abs()
            elif mask.score == "ema":
                old = total.get(name, torch.zeros_like(g))
                total[name] = mask.score_decay * old + (1 - mask.score_decay) * g.abs()
            else:
                total[name] = g.abs()
        masks = top_k(total, k, forced)
        if previous is not None:
            trace.append(iou(masks, previous))
            streak = streak + 1 if trace[-1] >= mask.iou_threshold else 0
            if streak >= mask.patience:
                return masks, step, trace
        previous = masks
        trainer.apply(grads, step)
    raise AssertionError("no stable mask")


def pretrain(
    model: PreTrainedModel, train: TrainConfig, masks: Masks | None, batch: Batch
) -> tuple[list[float], list[float]]:
    """Losses and masked gradient norms of ``train.steps`` updates; ``model`` is trained."""
    trainer = Trainer(model, train, masks)
    losses, norms = [], []
    for step in range(1, train.steps + 1):
        loss, grads = trainer.gradients(batch(step))
        losses.append(loss)
        norms.append(trainer.apply(grads, step))
    return losses, norms
