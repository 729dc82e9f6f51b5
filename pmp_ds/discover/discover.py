"""Stage I of the method: find the ticket (paper, section 2.1).

The model is trained densely from theta(0) with the run's own optimizer and schedule. In each
update, the reduced gradients are scored before clipping, and the scores give a candidate mask.
Afterwards the engine is discarded: masked pretraining starts from theta(0) again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig
from pmp_ds.discover.selection import Selector
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import ParamInfo, digest, num_params
from pmp_ds.optim.schedule import learning_rate
from pmp_ds.optim.zero import Fragment
from pmp_ds.state.checkpoint import Position
from pmp_ds.state.state_reader import StateReader
from pmp_ds.ticket.early_bird import EarlyBird
from pmp_ds.ticket.mask import count_common, iou, pack
from pmp_ds.ticket.scores import Scores
from pmp_ds.ticket.shared import Piece, SharedTicket
from pmp_ds.ticket.ticket import Origin, Ticket, exact_k

Table = Sequence[ParamInfo]


class Discovery:
    """Dense training until the candidate mask is stable, on an engine armed with None.

    ``step`` counts the updates made. The engine starts from theta(0), or from a checkpoint's
    weights and optimizer state, followed by ``restore``.
    """

    def __init__(self, engine: Engine, config: Config, table: Table, key: bytes = b"") -> None:
        """Prepare the selection; ``key`` (32 bytes) draws ``mask.random_fraction``. Collective."""
        self.step = 0
        self._engine, self._table = engine, table
        self._train, self._mask = config.train, config.mask
        self._fragments = engine.shards.fragments
        self._selector = Selector(
            self._fragments, table, self._mask, key, replicated=engine.shards.replicated
        )
        self._k = exact_k(self._mask.density, num_params(table))
        self._scores = Scores(self._mask.score, self._mask.score_decay)
        self._early_bird = EarlyBird(self._mask.iou_threshold, self._mask.patience)
        self._newest: list[torch.Tensor] | None = None  # packed bits of each fragment
        self._best: tuple[int, list[torch.Tensor]] | None = None

    def update(self, batch: torch.Tensor) -> tuple[torch.Tensor, float | None]:
        """Make one update with this rank's share of a batch. Collective.

        Returns a loss, as ``Engine.backward`` does, and the IoU with the previous candidate, None
        for the first. Raises UserError when a gradient is not finite.
        """
        engine, mask = self._engine, self._mask
        self.step += 1
        loss = engine.backward(batch)
        lr = learning_rate(self._train, self.step)
        if engine.overflowed():  # fp16: DeepSpeed skips the update and lowers the loss scale
            engine.step(lr)
            return loss, None
        candidate = self._selector.select(
            self._scores.update(engine.shards.gradients(), engine.loss_scale)
        )
        agreement = None
        if self._newest is not None:
            agreement = iou(self._num_common(candidate, self._newest), self._k)
            self._early_bird.observe(agreement)
            if mask.on_unstable == "best" and self._early_bird.best_so_far:
                self._best = self.step, candidate
        engine.step(lr)
        self._newest = candidate
        return loss, agreement

    @property
    def over(self) -> bool:
        return self._early_bird.stable or self.step >= self._mask.max_steps

    def ticket(self) -> SharedTicket:
        """Return the ticket once discovery is ``over``. Raises UserError when the mask is not
        stable under ``on_unstable: error``."""
        mask = self._mask
        if self._newest is None:
            raise UserError(
                f"all {mask.max_steps} updates of discovery overflowed in fp16: lower train.lr or "
                "use train.precision=bf16"
            )
        drawn, bits = self.step, self._newest
        if not self._early_bird.stable:
            if mask.on_unstable == "error":
                raise UserError(_unstable(mask, self._early_bird))
            if mask.on_unstable == "best" and self._best is not None:
                drawn, bits = self._best
        origin = Origin(
            density=mask.density,
            source="earlybird",
            score=mask.score,
            step=drawn,
            stable=self._early_bird.stable,
            model_digest=digest(self._table),
        )
        shards, device = self._engine.shards, self._engine.device
        return _shared(origin, self._table, self._fragments, bits, device, shards.replicated)

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state to resume from, besides the optimizer's: of this rank's fragments the
        running scores and packed candidates, by `KIND/PARAMETER/FIRST`, and the IoU history."""
        kinds = {
            "score": self._scores.values,
            "newest": self._newest,
            "best": self._best[1] if self._best else None,
        }
        state = {
            f"{kind}/{f.name}/{f.start}": values.cpu().clone()
            for kind, found in kinds.items()
            for f, values in zip(self._fragments, found or [], strict=False)
        }
        memory = {
            "trace": self._early_bird.trace,
            "streak": self._early_bird.streak,
            "best_step": self._best[0] if self._best else None,
        }
        return state, memory

    def restore(self, reader: StateReader, position: Position) -> None:
        """Load the result of ``snapshot``, at any world size and ZeRO stage."""
        self.step, memory = position.step, position.memory
        self._early_bird.trace = list(memory["trace"])
        self._early_bird.streak = memory["streak"]
        self._newest = self._local("newest", reader)
        best = self._local("best", reader)
        self._best = None if best is None else (memory["best_step"], best)
        if self._newest is not None and self._scores.score.add is not None:
            shards = self._engine.shards
            self._scores.values = [
                reader.read("score", f.name, f.start, f.numel).to(shards.device)
                for f in self._fragments
            ]

    def _num_common(self, one: list[torch.Tensor], other: list[torch.Tensor]) -> int:
        shards = self._engine.shards
        total = torch.zeros(1, dtype=torch.int64, device=shards.device)
        for a, b in zip(one, other, strict=True):
            total += count_common(a, b)
        return int(total if shards.replicated else dist.all_reduce_sum(total))

    def _local(self, which: str, reader: StateReader) -> list[torch.Tensor] | None:
        """Return this rank's share of a candidate, packed by fragment."""
        kept = reader.candidate(which, {info.name: info.shape for info in self._table})
        if kept is None:
            return None
        shards = self._engine.shards
        return [pack(kept(f.name, f.start, f.numel)).to(shards.device) for f in self._fragments]


def random_ticket(key: bytes, config: MaskConfig, table: Table) -> Ticket:
    """Return the ticket of ``draw_ticket``, whole on every rank. Collective."""
    return draw_ticket(key, config, table).gathered()


def draw_ticket(key: bytes, config: MaskConfig, table: Table) -> SharedTicket:
    """Draw the ablation's ticket: k elements of all parameters, uniformly with ``key`` (32 bytes);
    the same at any number of ranks. Collective."""
    share = [
        Fragment(info.name, 0, info.numel, 0, 0)
        for i, info in enumerate(table)
        if i % dist.world_size() == dist.rank()
    ]
    drawn = replace(config, random_fraction=1.0, quota="global")
    selector = Selector(share, table, drawn, key)
    kept = selector.select([torch.zeros(f.numel) for f in share])
    origin = Origin(
        density=config.density,
        source="random",
        score=None,
        step=None,
        stable=True,
        model_digest=digest(table),
    )
    return _shared(origin, table, share, kept, dist.device())


def _shared(
    origin: Origin,
    table: Table,
    fragments: Sequence[Fragment],
    bits: list[torch.Tensor],
    device: torch.device,
    replicated: bool = False,
) -> SharedTicket:
    pieces = [Piece(f.name, f.start, f.numel, b) for f, b in zip(fragments, bits, strict=True)]
    shapes = {info.name: tuple(info.shape) for info in table}
    return SharedTicket(origin, shapes, pieces, device, replicated)


def _unstable(mask: MaskConfig, early_bird: EarlyBird) -> str:
    highest = max(early_bird.trace, default=0.0)
    return (
        f"no stable mask within mask.max_steps={mask.max_steps}: the highest IoU of consecutive "
        f"masks was {highest:.4f}, but mask.iou_threshold={mask.iou_threshold} must be reached "
        f"{mask.patience} times in a row. Use mask.score=mean, allow more steps, or set "
        "mask.on_unstable to `last` or `best`"
    )
