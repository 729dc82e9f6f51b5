"""One run in three shapes: 2 ranks and ZeRO 1, 4 ranks and ZeRO 3, 1 rank and ZeRO 2, stopped in
between by a signal, against the same run in one shape. docs/FAULTS.md states the tolerance."""

import json
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import load_ticket
from pmp_ds.train.weight_files import read_weights
from tests.helpers.lives import (
    act,
    all_of,
    checkpoints,
    raise_signal,
    recorded_samples,
    repeated_batches,
)

pytestmark = pytest.mark.distributed

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
FLAGS = ("--train.micro_batch_size", "2", "--mask.source", "earlybird", "--mask.max_steps", "6",
         "--mask.iou_threshold", "1.0", "--mask.on_unstable", "last", "--run.val_every", "4",
         "--train.lr", "3e-3")  # fmt: skip


def samples(folder: Path) -> dict[tuple[str, int], list[str]]:
    """Digests of the samples of every update, in the order of the global batch."""
    parts: dict[tuple[str, int], dict[int, list[str]]] = defaultdict(dict)
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            stream, before, rank, digests = json.loads(line)
            assert rank not in parts[stream, before], "an update was done twice"
            parts[stream, before][rank] = digests
    return {k: [d for r in sorted(v) for d in v[r]] for k, v in parts.items()}


def values(run: RunDir, field: str) -> dict[tuple[str, int], float]:
    records = read_metrics(run.metrics)
    return {(r["phase"], r["step"]): r[field] for r in records if field in r}


@pytest.fixture
def shapes(request) -> list[Any]:
    """(pool, ZeRO stage) of the three lives."""
    return [(request.getfixturevalue(f"ranks{n}"), stage) for n, stage in ((2, 1), (4, 3), (1, 2))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_shapes(lives, shapes, tmp_path, precision):
    flags = (*FLAGS, "--train.precision", precision)
    for name in ("whole", "divided"):
        (tmp_path / f"{name}-samples").mkdir()
    record: Any = (recorded_samples, (str(tmp_path / "whole-samples"),))
    one, _ = lives(*flags, "--run.name", "whole", fault=all_of, given=(record,))
    assert one.code == 0, one.err
    record = (recorded_samples, (str(tmp_path / "divided-samples"),))
    for (pool, stage), stop in zip(shapes, (3, 8, None), strict=True):
        given = [record]
        if stop is not None:
            given.append((stop_in_training, (stop,)))
        one, *_ = lives(*flags, "--run.name", "divided", fault=all_of, given=given, pool=pool,
                        stage=stage)  # fmt: skip
        assert one.code == (0 if stop is None else 75), one.err
    whole, divided = RunDir(tmp_path / "whole"), RunDir(tmp_path / "divided")
    assert checkpoints(divided)[-1] == 12

    expected, found = samples(tmp_path / "whole-samples"), samples(tmp_path / "divided-samples")
    assert len(expected) == 6 + 12
    assert found == expected
    mask = load_ticket(whole.ticket).mask
    assert load_ticket(divided.ticket).id == load_ticket(whole.ticket).id
    for field in ("loss", "val_loss"):
        one, other = values(whole, field), values(divided, field)
        assert one.keys() == other.keys()
        torch.testing.assert_close(other, one, atol=TOLERANCE[precision], rtol=0)
    weights = [read_weights(r.checkpoints / "update-00000012/weights") for r in (whole, divided)]
    for name in mask.shapes:
        frozen, moved = ~mask.full(name), [read(name) for read in weights]
        assert torch.equal(moved[0][frozen], moved[1][frozen]), name


def stop_in_training(update: int) -> Any:
    """SIGTERM for the last rank, in masked pretraining alone."""
    return act(update, 0, _if_masked)


def _if_masked(engine: Any) -> None:
    if any(engine.optimizer.bits(flat) is not None for flat in engine.shards.flats):
        raise_signal(engine, signal.SIGTERM)


@pytest.mark.parametrize("score", ["mean", "ema"])
def test_discovery_in_three_shapes(lives, shapes, tmp_path, score):
    """Where gradients are the same to the bit, scores, IoUs and the ticket are."""
    flags = (*FLAGS, "--mask.score", score, "--train.steps", "2", "--train.warmup_steps", "1")
    same = (repeated_batches, (2,))
    one, _ = lives(*flags, "--run.name", "whole", fault=all_of, given=(same,))
    assert one.code == 0, one.err
    for (pool, stage), stop in zip(shapes, (2, 4, None), strict=True):
        given = [same, *([] if stop is None else [(act, (stop, 0, raise_signal, signal.SIGTERM))])]
        one, *_ = lives(*flags, "--run.name", "divided", fault=all_of, given=given, pool=pool,
                        stage=stage)  # fmt: skip
        assert one.code == (0 if stop is None else 75), one.err
    whole, divided = RunDir(tmp_path / "whole"), RunDir(tmp_path / "divided")
    assert load_ticket(divided.ticket).id == load_ticket(whole.ticket).id
    assert values(divided, "iou") == values(whole, "iou")
