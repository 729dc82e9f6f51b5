"""A tiny job of the product on the pretend device, and what it costs: discovery, then masked
pretraining, through the real pipeline.

    found = pool(2).run(measure, Setup(stage=2, ranks=2), str(folder))
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from tests.helpers.distributed import RankPool
from tests.pretend.device import build

VOCAB, BLOCK, MICRO_BATCH, ACCUMULATION = 512, 64, 2, 2
UPDATES, DISCOVERY = 8, 4
WAITS = ("wait", "late")
TENSORS_PER_LAYER, OTHER_TENSORS = 9, 3


def pool(ranks: int) -> RankPool:
    """Return ranks on the pretend device. Raises Unavailable."""
    environment = {"DS_ACCELERATOR": "cuda", "PRETEND_DEVICE": str(build.program())}
    return RankPool(ranks, env=environment, worker="tests.pretend.worker")


@dataclass(frozen=True, repr=False)
class Setup:
    """A configuration of the job."""

    stage: int
    precision: str = "bf16"
    ranks: int = 1
    offload: bool = False
    layers: int = 2
    master: str = "dense"
    moments: str = "fp32"
    vocab: int = VOCAB
    micro_batch: int | Literal["auto"] = MICRO_BATCH
    overlap: bool = False
    """Of communication with the backward pass at stages 1 and 2; stage 3 always does."""
    accumulate_fp32: bool = False

    def __repr__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Setup({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def __str__(self) -> str:
        words = [f"stage {self.stage}", self.precision]
        words += ["2 ranks"] * (self.ranks == 2)
        words += ["overlap"] * self.overlap + ["offload"] * self.offload
        words += ["accumulated in fp32"] * self.accumulate_fp32
        words += [f"{self.master} master"] * (self.master != "dense")
        words += [f"{self.moments} moments"] * (self.moments != "fp32")
        words += [f"{self.num_tensors} tensors"] * (self.layers > 2)
        return ", ".join(words)

    @property
    def num_tensors(self) -> int:
        return self.layers * TENSORS_PER_LAYER + OTHER_TENSORS

    @property
    def json(self) -> dict[str, Any]:
        """The DeepSpeed JSON, with buckets small enough that the model fills several."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": 50_000,
            "allgather_bucket_size": 50_000,
        }
        if self.stage == 3:
            zero |= {
                "overlap_comm": True,
                "stage3_param_persistence_threshold": 100,
                "stage3_prefetch_bucket_size": 20_000,
            }
        if self.overlap:
            zero["overlap_comm"] = True
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        own = {"pmp_ds": {"master": self.master}} if self.master != "dense" else {}
        return {"zero_optimization": zero} | own


@dataclass
class Cost:
    """What one update costs a rank."""

    waits: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)  # what, stack
    late: int = 0
    """Waits of the host that leave the device something to do."""
    step_launches: int = 0
    """Of the optimizer phase: DeepSpeed's ``step`` at an accumulation boundary."""
    step_bytes: int = 0
    peak_bytes: int = 0


@dataclass
class Measured:
    """What one rank found in the whole job."""

    num_params: int
    faults: Counter[tuple[str, str, str]]
    """(kind, what, place) of all races, mixed devices and lifetimes."""
    discovery: Cost
    training: Cost
    complement_changed: int
    bytes_before: int
    """Of device tensors when the job began: what earlier ones in this process have left."""
    bytes_left: int
    """That this one leaves."""
    losses: list[float]


class Meter:
    """Costs of each update, from one beat of the watchdog to the next."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._doing = ""
        self._num_findings = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[Any]:
        from pmp_ds.optim.zero import MaskedStep
        from pmp_ds.watch.watchdog import Watchdog
        from tests.pretend.device.findings import watch

        beat, step, meter = Watchdog.beat, MaskedStep.__call__, self

        def beating(dog: Any, doing: str) -> None:
            meter._next(doing)
            beat(dog, doing)

        def stepping(masked: Any, closure: Any = None) -> None:
            if not meter._doing:  # a trial of micro-batches, which looks at its own peak
                step(masked, closure)
                return
            with watch() as inside:
                step(masked, closure)
                cost = meter.costs.setdefault(meter._doing, Cost())
                cost.step_launches += inside.launches
                cost.step_bytes += inside.bytes_moved

        with (
            watch() as self._watched,
            mock.patch.object(Watchdog, "beat", beating),
            mock.patch.object(MaskedStep, "__call__", stepping),
        ):
            yield self._watched
            self._next("")

    def _next(self, doing: str) -> None:
        import torch

        cost = self.costs.setdefault(self._doing, Cost())
        new = self._watched.findings[self._num_findings :]
        cost.waits += [(f.what, f.stack) for f in new if f.kind == "wait"]
        cost.late += sum(f.kind == "late" for f in new)
        cost.peak_bytes = self._watched.peak_bytes
        gc.collect()  # or the peak would include earlier updates
        torch.ops.pretend.reset_peak()
        self._doing, self._num_findings = doing, self._num_findings + len(new)


def measure(setup: Setup, folder: str) -> Measured:
    """Run the job on this rank; ``folder`` is an empty one that all ranks see."""
    import time

    from pmp_ds import dist
    from pmp_ds.data.mixed_store import open_data
    from pmp_ds.log import read_metrics
    from pmp_ds.run_dir import RunDir
    from pmp_ds.train import pipeline

    place = Path(folder)
    dist.on_rank0(lambda: write_store(place / "store", setup.vocab))
    config = settings(setup, place)
    store = open_data(config.data.store)
    run, meter = RunDir(place / "job"), Meter()
    gc.collect()
    gc.disable()  # Python's own times differ with what ran before in this process
    try:
        with meter.watching() as watched:
            before = watched.bytes_held
            outcome = pipeline.run(config, setup.json, store, run, time.monotonic())
    finally:
        gc.enable()
    gc.collect()
    faults = Counter((f.kind, f.what, f.place) for f in watched.findings if f.kind not in WAITS)
    metrics = [row for row in read_metrics(run.metrics) if "loss" in row]
    return Measured(
        num_params=outcome.num_params,
        faults=faults,
        discovery=meter.costs[f"update {DISCOVERY - 1} of discovery"],
        training=meter.costs[f"update {UPDATES - 2}"],
        complement_changed=outcome.complement_changed,
        bytes_before=before,
        bytes_left=watched.bytes_held - before,
        losses=[float(row["loss"]) for row in metrics],
    )


def settings(setup: Setup, folder: Path) -> Any:
    """Return the recipe: a Llama of some ten thousand parameters that logs at its end alone."""
    from pmp_ds.config import (
        Config,
        DataConfig,
        GuardConfig,
        InitConfig,
        MaskConfig,
        ModelConfig,
        RunConfig,
        TrainConfig,
    )

    never = 1000
    return Config(
        run=RunConfig(
            name="job",
            root=str(folder),
            log_every=never,
            val_every=never,
            checkpoint_every=never,
            val_blocks=4,
        ),
        model=ModelConfig(
            hidden_size=64,
            num_layers=setup.layers,
            num_heads=2,
            intermediate_size=96,
            max_positions=128,
        ),
        init=InitConfig(seed=0),
        data=DataConfig(store=str(folder / "store")),
        mask=MaskConfig(density=0.7, max_steps=DISCOVERY, on_unstable="last"),
        train=TrainConfig(
            steps=UPDATES,
            micro_batch_size=setup.micro_batch,
            global_batch_size=MICRO_BATCH * ACCUMULATION * setup.ranks,
            precision=setup.precision,
            moments=setup.moments,
            accumulate_fp32=setup.accumulate_fp32,
            compile="none",  # there is no compiler for the device
            lr=1e-3,
            warmup_steps=2,
        ),
        guard=GuardConfig(drift_every=never),
    )


def write_store(folder: Path, vocab: int = VOCAB) -> None:
    """Write a store of random tokens with a skewed, learnable distribution."""
    import numpy as np

    from pmp_ds.data.arrow_store import write_shard
    from pmp_ds.data.manifest import write_manifest

    (folder / "tokenizer").mkdir(parents=True)
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 128), ("validation", 8)):
        (folder / split).mkdir(parents=True)
        blocks = (generator.random((count, BLOCK)) ** 3 * vocab).astype(np.uint16)
        shard = write_shard(folder, split, "00000-000.arrow", blocks)
        splits[split] = {"blocks": count, "documents": 1, "dropped_tokens": 0, "shards": [shard]}
    write_manifest(
        folder,
        {
            "block_size": BLOCK,
            "dtype": "uint16",
            "vocab_size": vocab,
            "eos_id": 2,
            "tokenizer": {"fingerprint": "f" * 64},
            "unigram_cross_entropy": 6.0,
            "splits": splits,
            "settings": {"input": [{"input": "random"}]},
        },
    )
