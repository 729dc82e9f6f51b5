"""Tensors that no number of ranks divides, or with fewer elements than ranks: a run finds the
ticket of one rank, and resumes with other ranks and at another ZeRO stage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig, TrainConfig
from pmp_ds.discover.discover import Discovery
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.objective import NextToken
from pmp_ds.engine.placement import Fill
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import Secret
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint, shelf, weight_files
from pmp_ds.state.manifest import Phase, Position
from pmp_ds.state.state_reader import StateReader
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.ticket.ticket import Ticket, load_ticket, save_ticket
from tests.helpers import tiny
from tests.helpers.distributed import run_ranks
from tests.helpers.odd_models import (
    GPT_OSS,
    KINDS,
    LLAMA,
    MIXTRAL,
    odd_batch,
    odd_config,
    odd_model,
)
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

ROWS, EXPLORED, DONE, UPDATES, LR = 2, 2, 2, 4, 3e-3
"""Sequences that count; updates before and after the checkpoints of discovery and of training."""
CONFIG = Config(
    mask=MaskConfig(density=0.5, max_steps=2 * EXPLORED, on_unstable="last"),
    train=TrainConfig(lr=LR, warmup_steps=0, weight_decay=0.1, clip_norm=0.0),
)
KEY = Secret(b"k" * 32)
POSITION = Position(step=0, consumed_samples=0, ticket_id=None, dataset_id="d" * 64, val_loss=None)
ATOL = 1e-5  # of a weight in fp32, where gradients are divided by 3, 5 or 6


THETA0 = {kind: dict(odd_model(kind).named_parameters()) for kind in KINDS}


class OfRank0(NextToken):
    """Count rank 0's sequences alone: the reduced gradient is theirs to the bit for any power of
    two of ranks, in whatever order it is summed. There is no clipping, because ranks and stages
    round norms differently."""

    def losses(self, logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return super().losses(logits, batch) * (0 if dist.rank() else dist.world_size())


@dataclass(frozen=True)
class Setup:
    kind: str
    precision: str
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.precision}-{self.stage}"

    @property
    def config(self) -> Config:
        train = replace(
            CONFIG.train,
            precision=self.precision,
            global_batch_size=ROWS * dist.world_size(),
            micro_batch_size=ROWS,
        )
        return replace(CONFIG, train=train)


class Part:
    """A phase of a run on this rank, from theta(0) or from its checkpoint."""

    def __init__(self, setup: Setup, run: RunDir, phase: Phase, mask: ParamMask | None) -> None:
        self.run, self.phase, self.initial = run, phase, Initial(odd_config(setup.kind), KEY)
        self.found = shelf.find(run, phase=phase)
        fill: Fill = self.initial.read
        if self.found:
            fill = weight_files.slices(self.found[0] / "weights")
        train, json = setup.config.train, ds_json(setup.stage)
        self.engine = Engine(self.initial.model(), train, json, OfRank0(), fill)
        self.engine.arm(mask)
        self.reader: StateReader | None = None
        if self.found:
            self.reader = checkpoint.load_state(self.found[0], self.engine, self.found[1])

    def save(self, run: RunDir, step: int, snapshot: Any = ({}, {})) -> None:
        more, memory = snapshot
        position = replace(POSITION, phase=self.phase, step=step, memory=memory)
        taken = checkpoint.take(self.engine, position, copy=False, more=more)
        checkpoint.write(run, taken)


def plain_linear() -> Any:
    """Return a context for DeepSpeed JSONs of ``ds_json``: stage 3 otherwise replaces torch's
    linear function for the rest of the process by one that rounds differently."""
    return mock.patch("torch.nn.functional.linear", torch._C._nn.linear)


def ds_json(stage: int) -> dict[str, Any]:
    value = tiny.ds_json(stage)
    value["zero_optimization"]["memory_efficient_linear"] = False
    return value


def explore(setup: Setup, run: RunDir) -> Ticket:
    """Finish discovery; save it half-way if it is new."""
    part = Part(setup, run, "discover", None)
    discovery = Discovery(part.engine, setup.config, part.initial.table)
    if part.found and part.reader:
        discovery.restore(part.reader, part.found[1])
    while not discovery.over:
        discovery.update(odd_batch(discovery.step, ROWS))
        if discovery.step == EXPLORED and not part.found:
            part.save(run, EXPLORED, discovery.snapshot())
    ticket = discovery.ticket().gathered()
    part.engine.close()
    return ticket


def train(setup: Setup, run: RunDir, copy: RunDir) -> dict[str, torch.Tensor]:
    """Finish training; save a new one half-way, a resumed one at once into ``copy``. Return rank
    0's weights."""
    part = Part(setup, run, "train", load_ticket(run.ticket).mask)
    begin = part.found[1].step if part.found else 0
    if part.found:
        part.save(copy, begin)
    for step in range(begin + 1, UPDATES + 1):
        part.engine.backward(odd_batch(100 + step, ROWS))
        part.engine.step(LR)
        if step == DONE and not part.found:
            part.save(run, step)
    weights = dict(part.engine.parameters())
    part.engine.close()
    return weights


Lived = tuple[str, dict[str, torch.Tensor]]  # ticket id, weights


@plain_linear()
def live(setups: Sequence[Setup], roots: Sequence[Path]) -> list[Lived]:
    """Begin runs, or resume them in the middle of discovery and again in that of training."""
    found = []
    for setup, root in zip(setups, roots, strict=True):
        run, copy = RunDir(root), RunDir(root / "copy")
        new = dist.on_rank0(lambda: not run.checkpoints.exists())  # noqa: B023 - called at once
        for one in (run, copy):
            dist.on_rank0(one.create)
        ticket = explore(setup, run)
        if new:
            dist.on_rank0(lambda: save_ticket(ticket, run.ticket))  # noqa: B023 - called at once
        found.append((ticket.id, train(setup, run, copy)))
    return found


def states(root: Path) -> dict[str, torch.Tensor]:
    """Return moments, master weights and weights of the checkpoint of a training, by name."""
    run = RunDir(root)
    found = shelf.find(run)
    assert found is not None
    ticket = load_ticket(RunDir(root.parent if root.name == "copy" else root).ticket)
    reader, read = StateReader(found[0]), weight_files.read_weights(found[0] / "weights")
    kept = {name: int(ticket.mask.full(name).sum()) for name in ticket.mask.shapes}
    assert len(reader.kinds) >= 2
    parts = {
        f"{kind}/{name}": reader.read(kind, name, 0, count)
        for kind in reader.kinds
        for name, count in kept.items()
    }
    return parts | {name: read(name) for name in kept}


def check(
    setups: tuple[Setup, Setup], root: Path, whole: Lived, begun: Lived, resumed: Lived, exact: bool
) -> None:
    """Compare a run in two parts with ``whole``, one of one rank."""
    before, after = states(root), states(root / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "bits of the state"
    mask, moved = load_ticket(root / "private/ticket").mask, 0
    for name, weight in resumed[1].items():
        kept, initial = mask.full(name), THETA0[setups[0].kind][name].to(weight.dtype)
        assert torch.equal(weight[~kept], initial[~kept]), name
        moved += int((weight != initial).sum())
    assert moved > 0.5 * mask.num_kept
    if exact or setups[0].precision == "fp32":
        assert begun[0] == resumed[0] == whole[0]
        for weights in (begun[1], resumed[1]):
            torch.testing.assert_close(weights, whole[1], atol=0 if exact else ATOL, rtol=0)


def run_parts(pools: Sequence[Any], setups: Sequence[tuple[Setup, Setup]], folder: Path) -> None:
    """Do each run on one rank at once, and on the ranks of two other pools in two parts."""
    roots = [folder / f"{one}-{other.stage}" for one, other in setups]
    wholes = [root.with_name(f"{root.name}-whole") for root in roots]
    firsts, seconds = [one for one, _ in setups], [other for _, other in setups]
    whole = pools[0](firsts, wholes)
    begun, resumed = pools[1](firsts, roots), pools[2](seconds, roots)
    exact = all(len(found).bit_count() == 1 for found in (begun, resumed))
    for i, (both, root) in enumerate(zip(setups, roots, strict=True)):
        check(both, root, whole[0][i], begun[0][i], resumed[0][i], exact)


DAILY = [
    (Setup(GPT_OSS, "bf16", 2), 2, Setup(GPT_OSS, "bf16", 1), 4),
]
OTHERS = [
    (Setup(MIXTRAL, "fp32", 3), 3, Setup(MIXTRAL, "fp32", 1), 2),
    (Setup(GPT_OSS, "bf16", 3), 4, Setup(GPT_OSS, "bf16", 3), 2),
    (Setup(GPT_OSS, "bf16", 0), 3, Setup(GPT_OSS, "bf16", 3), 4),
    (Setup(GPT_OSS, "fp32", 1), 4, Setup(GPT_OSS, "fp32", 2), 3),
    (Setup(MIXTRAL, "bf16", 2), 4, Setup(MIXTRAL, "bf16", 0), 2),
    (Setup(LLAMA, "bf16", 3), 2, Setup(LLAMA, "bf16", 3), 4),
]


@pytest.mark.parametrize(
    ("first", "ranks", "second", "others"), daily([*DAILY, *OTHERS], DAILY), ids=str
)
def test_resumed_with_other_ranks(request, ranks1, tmp_path, first, ranks, second, others):
    pools = [request.getfixturevalue(f"ranks{n}") for n in (1, ranks, others)]
    run = [lambda *given, pool=pool: pool.run(live, *given) for pool in pools]
    run_parts(run, [(first, second)], tmp_path)


MANY = [
    (Setup(LLAMA, "fp32", 0), Setup(LLAMA, "fp32", 1)),
    (Setup(MIXTRAL, "fp32", 1), Setup(MIXTRAL, "fp32", 2)),
    (Setup(GPT_OSS, "bf16", 2), Setup(GPT_OSS, "bf16", 0)),
    (Setup(LLAMA, "fp32", 3), Setup(LLAMA, "fp32", 3)),
]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "others"), [(16, 8), (8, 3), (2, 5), (6, 4)])
def test_many_ranks(tmp_path, ranks, others):
    run = [lambda *given, n=n: run_ranks(n, live, *given, timeout=400) for n in (1, ranks, others)]
    run_parts(run, MANY, tmp_path)


@plain_linear()
def few(stage: int, root: Path) -> tuple[str, dict[str, torch.Tensor], int]:
    """Find a ticket among six elements, train it and save it; return also how many fragments this
    rank owns."""

    def made() -> Engine:
        model = odd_model(LLAMA)
        for name, param in model.named_parameters():
            param.requires_grad_(name == TRAINED)
        return Engine(model, config.train, ds_json(stage), OfRank0())

    config, run = Setup(LLAMA, "fp32", stage).config, RunDir(root)
    table = tuple(info for info in Initial(odd_config(LLAMA), KEY).table if info.name == TRAINED)
    dist.on_rank0(run.create)
    engine = made()
    engine.arm(None)
    discovery = Discovery(engine, config, table)
    while not discovery.over:
        discovery.update(odd_batch(discovery.step, ROWS))
    ticket = discovery.ticket().gathered()
    engine.close()
    dist.on_rank0(lambda: save_ticket(ticket, run.ticket))
    engine = made()
    engine.arm(ticket.mask)
    engine.backward(odd_batch(100, ROWS))
    engine.step(LR)
    checkpoint.save(run, engine, replace(POSITION, step=1))
    owned, weights = len(engine.shards.fragments), dict(engine.parameters())
    engine.close()
    return ticket.id, weights, owned


TRAINED = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("stage", daily([1, 2, 3], [2]))
def test_a_rank_without_a_fragment(ranks1, ranks4, tmp_path, stage):
    (one,), ranks = (
        pool.run(few, stage, tmp_path / str(pool.world_size)) for pool in (ranks1, ranks4)
    )
    assert sorted(owned for *_, owned in ranks) == [0, 1, 1, 1]
    assert {ticket for ticket, *_ in ranks} == {one[0]}
    assert not torch.equal(one[1][TRAINED], THETA0[LLAMA][TRAINED])
    torch.testing.assert_close(ranks[0][1], one[1], atol=0, rtol=0)
    torch.testing.assert_close(states(tmp_path / "4"), states(tmp_path / "1"), atol=0, rtol=0)
