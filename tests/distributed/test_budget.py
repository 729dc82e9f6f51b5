"""A dry run says what engines do: bytes of tensors, of the peak, on disk and on the wire."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as torch_dist
from deepspeed.comm.torch import TorchBackend

from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig, ModelConfig, TrainConfig
from pmp_ds.config.precision import precision_of
from pmp_ds.discover.discover import Discovery, random_ticket
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.memory import Meter
from pmp_ds.model.build import model_config
from pmp_ds.model.initial import Initial
from pmp_ds.model.keys import Secret
from pmp_ds.run_dir import RunDir
from pmp_ds.state import checkpoint
from pmp_ds.ticket.ticket import Ticket
from pmp_ds.train import phases, wire
from pmp_ds.train.activations import timeline
from pmp_ds.train.budget import Budget
from tests.distributed.test_checkpoint import POSITION
from tests.helpers.tiers import daily

pytestmark = pytest.mark.distributed

MODEL = ModelConfig(
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=352,
    max_positions=64,
)
VOCAB, BLOCK, MICRO, WORLD = 1001, 64, 4, 2
ZERO: dict[str, Any] = {"reduce_bucket_size": 50_000}
ZERO3 = ZERO | {
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 2000,
    "sub_group_size": 100_000,
}


@dataclass(frozen=True)
class Setup:
    stage: int
    precision: str = "bf16"
    master: str = "dense"
    moments: str = "fp32"
    accumulation: int = 1
    activation_checkpointing: Any = "none"
    optimizer: str = "adamw"
    offload: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))

    @property
    def json(self) -> dict[str, Any]:
        zero = {"stage": self.stage} | (ZERO3 if self.stage == 3 else ZERO)
        zero |= {f"offload_{what}": {"device": "cpu"} for what in self.offload}
        return {"zero_optimization": zero, "pmp_ds": {"master": self.master}}

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            precision=self.precision,
            moments=self.moments,
            optimizer=self.optimizer,
            activation_checkpointing=self.activation_checkpointing,
            micro_batch_size=MICRO,
            global_batch_size=MICRO * self.accumulation * WORLD,
        )

    @cached_property
    def theta0(self) -> Initial:
        hf = model_config(MODEL, vocab_size=VOCAB, eos_id=2, bos_id=None, block_size=BLOCK)
        return Initial(hf, Secret(b"k" * 32))

    @cached_property
    def ticket(self) -> Ticket:
        return random_ticket(b"m" * 32, MaskConfig(source="random"), self.theta0.table)

    @property
    def budget(self) -> Budget:
        config, kept = Config(train=self.train), self.ticket.mask.num_kept
        return Budget(self.theta0.shapes, kept, config, self.json, WORLD, on_cpu=True)

    def engine(self) -> Engine:
        return Engine(self.theta0.model(), self.train, self.json, fill=self.theta0.read)

    def rows(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(dist.rank())
        return torch.randint(0, VOCAB, (MICRO * self.accumulation, BLOCK), generator=generator)


SETUPS = [
    Setup(0, "fp32"),
    Setup(0),
    Setup(1, "fp32", accumulation=2),
    Setup(1),
    Setup(2, accumulation=2),
    Setup(2, master="split", moments="bf16"),
    Setup(2, activation_checkpointing="selective", optimizer="sgd"),
    Setup(3),
    Setup(3, "fp32", accumulation=2),
    Setup(3, master="compact", moments="int8", activation_checkpointing="full"),
]
DAILY = [SETUPS[3], SETUPS[5], SETUPS[9]]


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the memory that these tensors share."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def tensors_of(setup: Setup) -> tuple[dict[str, int], dict[str, int]]:
    """The predicted model states, and those of an engine, by category."""
    engine = setup.engine()
    engine.arm(setup.ticket.mask)
    params = list(engine._engine.module.parameters())
    halves = [p.ds_tensor if setup.stage == 3 else p.data for p in params]
    found = {"weights": storages(halves)}
    gradients: list[int] = []

    def between() -> None:
        """Stages 0 and 1 have every gradient between two micro-batches."""
        gradients.append(storages(p.grad for p in params if p.grad is not None))
        original()

    original = engine._engine.step
    with mock.patch.object(engine._engine, "step", between):
        engine.backward(setup.rows())
    if setup.stage in (0, 2):  # at stage 1 reduced gradients are a part of the others
        gradients.append(storages(engine.shards.gradients()))
    if setup.stage == 3:
        gradients.append(storages([engine._engine.optimizer.grad_partitions_flat_buffer]))
    if gradients:
        found["gradients"] = max(gradients)
    state = [(name, value) for s in engine.optimizer.state.values() for name, value in s.items()]
    apart = [value for name, value in state if name.startswith("master")]
    flats = engine.shards.flats if (setup.stage, setup.precision) != (0, "fp32") else []
    found["master weights"] = storages(apart or flats)
    found["moments"] = storages(
        value for name, value in state if name.startswith("exp_avg") or name == "momentum_buffer"
    )
    bits = [engine.optimizer.bits(flat) for flat in engine.shards.flats]
    found["mask"] = storages(packed for packed in bits if packed is not None)
    engine.close()
    predicted = setup.budget.states()
    return {name: predicted[name] for name in found}, found


@pytest.mark.parametrize("setup", daily(SETUPS, DAILY), ids=str)
def test_model_states_are_those_of_an_engine(ranks2, setup):
    for predicted, found in ranks2.run(tensors_of, setup):
        for name in ("weights", "gradients"):
            assert found.get(name) == predicted.get(name), name
        assert found["mask"] == pytest.approx(predicted["mask"], abs=2 * 40), "a byte per flat"
        for name in ("master weights", "moments"):  # as many of the ticket's elements, nearly
            assert found[name] == pytest.approx(predicted[name], rel=0.01), name
        if setup.master == "dense":
            assert found["master weights"] == predicted["master weights"]


def peaks_of(setup: Setup) -> tuple[int, int, int, int]:
    """The predicted and the real peak of building an engine, and of an update."""
    budget, dtype = setup.budget, precision_of(setup.train).dtype
    model = setup.theta0.model()
    counted = timeline(model, setup.train, BLOCK, dtype, "cpu")
    # On the CPU all is in host memory. The ticket is drawn already, and theta(0) by small pieces.
    there = phases.host(budget, "start")
    del there["theta(0), drawn"]
    start = sum(phases.start(budget).values()) + sum(there.values())
    update = sum(phases.update(budget, counted, MICRO).values())
    update += sum(phases.host(budget, "training").values())
    with Meter(dist.device()) as meter:
        held: list[Engine] = []

        def build() -> None:
            held.append(setup.engine())
            held[0].arm(setup.ticket.mask)

        def step() -> None:
            held[0].backward(setup.rows())
            held[0].step(1e-3)

        built = meter.peak_of(build)
        step()  # the first one traces the model at stage 3
        stepped = meter.peak_of(step)
        held[0].close()
    return start, built, update, stepped


OFFLOADED = [
    Setup(2, accumulation=2, offload=("optimizer",)),
    Setup(3, offload=("optimizer", "param")),
]


@pytest.mark.parametrize("setup", daily([*SETUPS, *OFFLOADED], DAILY), ids=str)
def test_the_peak_of_an_update(ranks2, setup):
    for start, built, update, stepped in ranks2.run(peaks_of, setup):
        assert update == pytest.approx(stepped, rel=0.03)
        # Under offload the peaks of device and host are added up, whatever the moment.
        assert start == pytest.approx(built, rel=0.25 if setup.offload else 0.15)


def written(setup: Setup, root: str) -> tuple[int, int]:
    """The predicted bytes of a checkpoint, and those on disk."""
    run, budget = RunDir(Path(root)), setup.budget
    dist.on_rank0(run.create)
    engine = setup.engine()
    engine.arm(setup.ticket.mask)
    checkpoint.save(run, engine, POSITION)
    engine.close()
    sizes = [path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file()]
    return budget.element * budget.num_params + budget.state_bytes(), sum(sizes)


DISK = [Setup(0, "fp32"), Setup(1), Setup(2, master="split", moments="int8"), Setup(3)]


@pytest.mark.parametrize("setup", daily(DISK, DISK[2:3]), ids=str)
def test_a_checkpoint_on_disk(ranks2, setup, tmp_path):
    predicted, found = ranks2.run(written, setup, str(tmp_path / "run"))[0]
    assert 0 <= found - predicted < 0.02 * predicted


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes of the tensors in collectives, by kind."""
    found: Counter[str] = Counter()
    places = [
        (torch_dist, "all_reduce", "all-reduce", lambda tensor, *_: [tensor]),
        (TorchBackend, "all_gather_into_tensor", "all-gather", lambda _, out, *__: [out]),
        (TorchBackend, "all_gather", "all-gather", lambda _, outs, *__: outs),
        (TorchBackend, "all_gather_coalesced", "all-gather", lambda _, outs, *__: outs),
        (
            TorchBackend,
            "reduce_scatter_tensor",
            "reduce-scatter",
            lambda _, __, given, *___: [given],
        ),
        (TorchBackend, "reduce_scatter", "reduce-scatter", lambda _, __, given, *___: given),
        (TorchBackend, "reduce", "reduce", lambda _, tensor, *__: [tensor]),
    ]

    def counting(original: Any, kind: str, tensors: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            found[kind] += sum(t.nbytes for t in tensors(*args, *options.values()))
            return original(*args, **options)

        return call

    with ExitStack() as patches:
        for place, name, kind, tensors in places:
            replaced = counting(getattr(place, name), kind, tensors)
            patches.enter_context(mock.patch.object(place, name, replaced))
        yield found


def traffic_of(setup: Setup, discovery: bool) -> tuple[Counter[str], Counter[str]]:
    """The predicted bytes of tensors in collectives of an update, and those counted."""
    budget, predicted = setup.budget, Counter[str]()
    transfers = wire.update(budget)
    transfers += wire.selection(budget, setup.theta0.table) if discovery else []
    for one in transfers:
        predicted[one.collective] += one.tensor_bytes
    engine = setup.engine()
    engine.arm(None if discovery else setup.ticket.mask)
    update: Callable[[], object] = partial(_update, engine, setup.rows())
    if discovery:
        explorer = Discovery(engine, Config(train=setup.train), setup.theta0.table, b"r" * 32)
        update = partial(explorer.update, setup.rows())
    for _ in range(2):  # stage 3 traces the model first
        update()
    with counted() as found:
        update()
        dist.all_reduce_sum(torch.zeros(2))  # loss and stop, by the loop
    engine.close()
    return predicted, found


def _update(engine: Engine, rows: torch.Tensor) -> None:
    engine.backward(rows)
    engine.step(1e-3)


TRAFFIC = [Setup(0, "fp32"), Setup(1, accumulation=2), Setup(2, accumulation=2), Setup(3)]
TRAFFIC += [Setup(3, accumulation=2), Setup(2, "fp32")]


@pytest.mark.parametrize("setup", daily(TRAFFIC, TRAFFIC[4:5]), ids=str)
def test_bytes_on_the_wire(ranks2, setup):
    for predicted, found in ranks2.run(traffic_of, setup, False):
        assert found == predicted


@pytest.mark.parametrize("setup", daily(TRAFFIC[:4], TRAFFIC[2:3]), ids=str)
def test_bytes_on_the_wire_in_discovery(ranks2, setup):
    for predicted, found in ranks2.run(traffic_of, setup, True):
        assert found == predicted
