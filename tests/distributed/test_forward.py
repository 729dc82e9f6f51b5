"""Settings of how a model computes, in whole runs."""

import json

import pytest

from pmp_ds.log import read_metrics

pytestmark = pytest.mark.distributed


def losses(run) -> list[float]:
    return [r["loss"] for r in read_metrics(run.metrics) if r["phase"] == "train" and "loss" in r]


@pytest.mark.parametrize(("stage", "kind"), [(1, "selective"), (1, "full"), (3, "full")])
def test_recomputed_activations_change_no_loss(lives, run, calm, stage, kind):
    one, _ = lives("--train.activation_checkpointing", kind, stage=stage)
    assert one.code == 0, one.err
    found, expected = losses(run), losses(calm)
    assert len(found) == len(expected) > 0
    if stage == 1:  # as the calm run
        assert found == expected
    assert found == pytest.approx(expected, abs=1e-5)


def test_selective_at_stage_3(lives):
    one, _ = lives("--train.activation_checkpointing", "selective", stage=3)
    assert one.code == 1
    assert "train.activation_checkpointing=selective works at stages 0 to 2" in one.err


def test_layers_that_are_not_compiled_say_why(lives):
    one, other = lives("--train.compile", "layers", stage=3)
    assert one.code == 0, one.err
    assert "ZeRO 3 gathers parameters inside the layers, so they are not compiled" in one.out
    assert "not compiled" not in other.out


def test_a_trace(lives, run):
    one, _ = lives("--train.profile", "3:4")
    assert one.code == 0, one.err
    (trace,) = run.profile.iterdir()
    assert f"trace of updates: {trace}" in one.out
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::embedding" for event in events) == 2
    assert not any("Input Dims" in event.get("args", {}) for event in events)
