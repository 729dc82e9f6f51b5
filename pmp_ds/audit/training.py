"""Attacks that run the model on text: gradients of the release, and repeated discovery.

They use plain single-process torch in fp32. Every attack stops after ``case.seconds``.
"""

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case
from pmp_ds.audit.seeds import initial_model
from pmp_ds.config import Config, TrainConfig
from pmp_ds.data.arrow_store import Store
from pmp_ds.data.loader import BlockLoader, order_key
from pmp_ds.model.next_token import token_losses
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.ticket.early_bird import EarlyBird

GRADIENT_BATCHES = 64
_BATCH = 8  # sequences, if no recipe gives a number
_STRANGERS_SEED = 0x5EED  # for theta(0), if the attacker does not know the run's

Gradients = dict[str, torch.Tensor]


def gradients(case: Case) -> Finding:
    """Score by |gradient|: the loss of the finished model is steeper at trained elements."""
    assert case.text is not None
    found, batches = mean_gradient(case.release.model(), case.text, case.seconds)
    note = f"mean |gradient| over {batches} batches of {_BATCH} x {case.text.block_size} tokens"
    return Finding(note=note, scores=case.gather(lambda name: found[name]))


def mean_gradient(
    model: PreTrainedModel,
    text: Store,
    seconds: float,
    most: int = GRADIENT_BATCHES,
    *,
    signed: bool = False,
) -> tuple[Gradients, int]:
    """Return the sum of |gradient| of each parameter (with ``signed``, of the gradient), in its
    shape, and the number of batches."""
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    deadline = time.monotonic() + seconds
    for count, batch in enumerate(_batches(text, _BATCH, order_key("audit", 0)), start=1):
        _backward(model, batch)
        for name, param in model.named_parameters():
            if param.grad is not None:
                total[name] += param.grad if signed else param.grad.abs()
        if count == most or time.monotonic() > deadline:
            return total, count
    raise AssertionError("the stream of batches has no end")


def rerun_same_seed(case: Case) -> Finding:
    """Repeat discovery from the recipe's own theta(0) and data order."""
    assert case.config is not None
    seed = case.config.init.seed
    if seed is None:
        note = "the recipe has no seed: neither theta(0) nor the order of the data can be repeated"
        return Finding(note=note, evidence=False)
    return _rerun(case, case.config, initial_model(case.release, seed), seed)


def rerun_other_seed(case: Case) -> Finding:
    """Repeat discovery from another theta(0), in another data order."""
    assert case.config is not None
    return _rerun(case, case.config, initial_model(case.release, _STRANGERS_SEED), _STRANGERS_SEED)


def rediscovery(case: Case) -> Finding:
    """Repeat discovery from the release instead of theta(0)."""
    return _rerun(case, case.config or Config(), case.release.model(), _STRANGERS_SEED)


def _rerun(case: Case, config: Config, model: PreTrainedModel, order: int) -> Finding:
    """Train densely with the recipe's optimizer until the scores give a stable mask."""
    assert case.text is not None
    train, mask = config.train, config.mask
    total = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    fixed = {n for n, p in model.named_parameters() if mask.always_train and p.ndim == 1}
    optimizer = _optimizer(model, train)
    early_bird = EarlyBird(mask.iou_threshold, mask.patience)
    deadline = time.monotonic() + case.seconds
    before, stable = None, False
    batches = _batches(case.text, train.global_batch_size, order_key("discover", order))
    for step, batch in enumerate(batches, start=1):
        _backward(model, batch)
        for name, param in model.named_parameters():
            if param.grad is not None:
                total[name] += param.grad.abs()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()
        scores = case.gather(
            lambda name: torch.full_like(total[name], torch.inf) if name in fixed else total[name]
        )
        kept = scores >= scores.kthvalue(max(1, int((1 - mask.density) * len(scores)))).values
        stable = before is not None and early_bird.observe(_iou(kept, before))
        before = kept
        if stable or step == mask.max_steps or time.monotonic() > deadline:
            break
    note = f"{step} updates of {train.global_batch_size} x {case.text.block_size} tokens"
    return Finding(note=note if stable else note + ", stopped before it was stable", scores=scores)


def _iou(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def _backward(model: PreTrainedModel, batch: torch.Tensor) -> None:
    model.zero_grad()
    logits = model(input_ids=batch, use_cache=False).logits
    token_losses(logits, batch).mean().backward()


def _batches(text: Store, size: int, key: bytes) -> Iterator[torch.Tensor]:
    """Yield (size, block_size) int64 without end, in the order of ``key``."""
    with BlockLoader(text.split("train"), key, size, 0, 1) as loader:
        while True:
            yield loader.next()


def _optimizer(model: PreTrainedModel, train: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's own optimizer, which trains everything."""
    # Imported here because they import DeepSpeed, which no other attack needs.
    from pmp_ds.optim.masked import parameter_groups
    from pmp_ds.optim.rules import optimizer_of

    optimizer = optimizer_of(train, parameter_groups(model.named_parameters(), train.weight_decay))
    optimizer.arm(dict.fromkeys(model.parameters()))
    return optimizer


_WEAKENED = "mask.quota and mask.random_fraction weaken it"
ATTACKS = (
    Attack(
        name="rerun discovery, same seed",
        needs="recipe, its seed, its data",
        run=rerun_same_seed,
        inputs=("config", "text"),
        preventable=True,
        countermeasure="secret initial weights and warm-up order",
    ),
    Attack(
        name="rerun discovery, other seed",
        needs="recipe, its data",
        run=rerun_other_seed,
        inputs=("config", "text"),
        preventable=False,
        countermeasure=_WEAKENED,
    ),
    Attack(
        name="gradients",
        needs="text",
        run=gradients,
        inputs=("text",),
        preventable=False,
        countermeasure=_WEAKENED,
    ),
    Attack(
        name="re-discovery on the release",
        needs="text",
        run=rediscovery,
        inputs=("text",),
        preventable=False,
        countermeasure=_WEAKENED,
    ),
)
