"""The shard map of a DeepSpeed engine."""

from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pmp_ds.optim.zero.shards import ZeroShards
from pmp_ds.optim.zero.stage0 import Stage0
from pmp_ds.optim.zero.stage3 import Stage3
from pmp_ds.optim.zero.stage12 import Stage12


def shards_of(engine: Any) -> ZeroShards:
    """Return this rank's share of an engine at any stage."""
    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return Stage3(zero, engine.param_names)
    if isinstance(zero, DeepSpeedZeroOptimizer):
        return Stage12(zero, engine.param_names)
    return Stage0(engine, engine.param_names)
