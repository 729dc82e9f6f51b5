"""The benchmark of whole updates on the pretend device: no mixed devices, and a GPU's figures."""

import contextlib
import io
import re

import pytest

pytestmark = [pytest.mark.pretend, pytest.mark.distributed, pytest.mark.nightly]

OPTIONS = "--shape tiny --repeats 2 --updates 1 --compile none --rivals deepspeed torch"


def compare(options: str) -> str:
    """Return what rank 0 prints."""
    from benchmarks import discovery, step

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        step.main(step.arguments().parse_args(options.split()))
        common = options.partition(" --rivals")[0].split()
        discovery.main(discovery.arguments().parse_args(common))
    return output.getvalue()


def test_whole_updates_on_the_device(pretend1) -> None:
    (output,) = pretend1.run(compare, OPTIONS)
    goals = re.findall(r"^figure (\w+) \S+ goal (.+) (?:met|short)$", output, re.MULTILINE)
    assert dict(goals) == {
        "step_speed_vs_deepspeed": ">= 1.0",
        "step_optimizer_vs_deepspeed": "<= 0.4",
        "step_peak_memory_vs_deepspeed": "<= 0.85",
        "discovery_update_vs_ordinary": "<= 1.05",
    }
    assert "bf16, ZeRO 1" in output
    ratio = re.search(r"^figure step_peak_memory_vs_deepspeed (\S+) goal", output, re.MULTILINE)
    assert ratio is not None
    assert 0.5 < float(ratio[1]) <= 1.0, "DeepSpeed's buffers, of the same size, are most of it"
