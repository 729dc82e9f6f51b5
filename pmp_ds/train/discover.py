"""Stage I of the method: find the ticket (paper, section 2.1).

Dense training from theta(0) with the run's own optimizer and schedule; after each update's
gradients are reduced, and before clipping, their scores give a candidate mask. The engine is
thrown away afterwards: masked pretraining starts from theta(0) again.
"""

from collections.abc import Callable, Sequence

import torch

from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig
from pmp_ds.data.loader import BlockLoader
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import ParamInfo, digest, num_params
from pmp_ds.model.stream import uniforms
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.optim.zero_shards import Fragment
from pmp_ds.ticket.early_bird import EarlyBird
from pmp_ds.ticket.mask import ParamMask, count_common, iou, pack, unpack
from pmp_ds.ticket.scores import Scores
from pmp_ds.ticket.ticket import Ticket, exact_k
from pmp_ds.ticket.topk import select_top_k
from pmp_ds.train.engine import Engine

# (update, mean loss, IoU with the previous candidate or None for the first)
Report = Callable[[int, float, float | None], None]
Table = Sequence[ParamInfo]


def discover(
    engine: Engine, loader: BlockLoader, config: Config, table: Table, report: Report
) -> Ticket:
    """Train densely until the candidate mask is stable; returns the ticket, on every rank.

    Raises UserError when a gradient is not finite, and when ``mask.max_steps`` pass without a
    stable mask under ``on_unstable: error``.
    """
    mask = config.mask
    fragments = engine.shards.fragments
    starts, keep_all = _placement(fragments, table, mask.always_train)
    k = exact_k(mask.density, num_params(table))
    scores = Scores(mask.score, mask.score_decay)
    early_bird = EarlyBird(mask.iou_threshold, mask.patience)
    best: tuple[int, list[torch.Tensor]] | None = None
    previous: list[torch.Tensor] | None = None
    stable, step = False, 0
    engine.arm(None)
    while not stable and step < mask.max_steps:
        step += 1
        loss = engine.backward(loader.next())
        lr = learning_rate(config.train, step)
        if engine.overflowed():  # fp16: DeepSpeed skips the update and lowers the loss scale
            engine.step(lr)
            report(step, _mean(loss), None)
            continue
        candidate = select_top_k(
            scores.update(engine.shards.gradients(), engine.loss_scale),
            starts,
            [fragment.name for fragment in fragments],
            k,
            keep_all=keep_all,
            replicated=engine.shards.replicated,
        )
        agreement = None
        if previous is not None:
            common = sum(count_common(a, b) for a, b in zip(candidate, previous, strict=True))
            if not engine.shards.replicated:
                total = torch.tensor([common], dtype=torch.int64, device=engine.device)
                common = int(dist.all_reduce_sum(total))
            agreement = iou(common, k)
            stable = early_bird.observe(agreement)
            if mask.on_unstable == "best" and early_bird.best_so_far:
                best = step, candidate
        engine.step(lr)
        report(step, _mean(loss), agreement)
        previous = candidate
    if previous is None:
        raise UserError(
            f"all {mask.max_steps} updates of discovery overflowed in fp16: lower train.lr or use "
            "train.precision=bf16"
        )
    drawn, bits = step, previous
    if not stable:
        if mask.on_unstable == "error":
            raise UserError(_unstable(mask, early_bird))
        if mask.on_unstable == "best" and best is not None:
            drawn, bits = best
    return Ticket(
        mask=_gather(fragments, bits, table, engine.device, replicated=engine.shards.replicated),
        density=mask.density,
        source="earlybird",
        score=mask.score,
        step=drawn,
        stable=stable,
        model_digest=digest(table),
    )


def random_ticket(key: bytes, config: MaskConfig, table: Table) -> Ticket:
    """The ablation: k elements drawn uniformly with ``key`` (32 bytes); the same at any number of
    ranks. Collective."""
    share = [
        Fragment(info.name, 0, info.numel, 0, 0)
        for i, info in enumerate(table)
        if i % dist.world_size() == dist.rank()
    ]
    starts, keep_all = _placement(share, table, config.always_train)
    draws = [
        torch.from_numpy(uniforms(key, start, f.numel)).float()
        for f, start in zip(share, starts, strict=True)
    ]
    k = exact_k(config.density, num_params(table))
    kept = select_top_k(draws, starts, [f.name for f in share], k, keep_all=keep_all)
    return Ticket(
        mask=_gather(share, kept, table, dist.device()),
        density=config.density,
        source="random",
        score=None,
        step=None,
        stable=True,
        model_digest=digest(table),
    )


def _mean(loss: torch.Tensor) -> float:
    return float(dist.all_reduce_sum(loss)) / dist.world_size()


def _placement(
    fragments: Sequence[Fragment], table: Table, always_train: bool
) -> tuple[list[int], list[bool]]:
    """Global index of each fragment's first element, and whether all of it is kept."""
    infos = {info.name: info for info in table}
    starts = [infos[f.name].start + f.start for f in fragments]
    return starts, [always_train and infos[f.name].constant for f in fragments]


def _gather(
    fragments: Sequence[Fragment],
    bits: list[torch.Tensor],
    table: Table,
    device: torch.device,
    *,
    replicated: bool = False,
) -> ParamMask:
    """The whole mask on every rank from the fragments of all of them, one parameter at a time."""
    whole = {}
    for info in table:
        dense = torch.zeros(info.numel, dtype=torch.uint8, device=device)
        for f, packed in zip(fragments, bits, strict=True):
            if f.name == info.name:
                dense[f.start : f.start + f.numel] = unpack(packed, f.numel).to(device)
        if not replicated:
            dist.all_reduce_sum(dense)
        whole[info.name] = pack(dense.bool().cpu())
    return ParamMask(bits=whole, shapes={info.name: tuple(info.shape) for info in table})


def _unstable(mask: MaskConfig, early_bird: EarlyBird) -> str:
    highest = max(early_bird.trace, default=0.0)
    return (
        f"no stable mask within mask.max_steps={mask.max_steps}: the highest IoU of consecutive "
        f"masks was {highest:.4f}, mask.iou_threshold={mask.iou_threshold} is needed "
        f"{mask.patience} times in a row. Use mask.score=mean, allow more steps, or set "
        "mask.on_unstable to `last` or `best`"
    )
