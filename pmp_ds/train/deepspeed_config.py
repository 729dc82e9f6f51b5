"""The DeepSpeed JSON: how a run fits on the machine. The recipe says what is learned.

A JSON must not repeat, contradict or extend what the recipe owns; every disagreement is listed in
one error. The rest of it reaches DeepSpeed untouched.
"""

import json
from pathlib import Path
from typing import Any

from pmp_ds.config import TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.train.cut import Cut

OWN_SECTION = "pmp_ds"  # settings of ours in the JSON; DeepSpeed never sees them
_REFUSED = {
    "optimizer": "the optimizer is train.* in the recipe",
    "scheduler": "the schedule is train.lr, train.warmup_steps and train.min_lr_ratio",
    "zero_optimization.round_robin_gradients": "it breaks DeepSpeed's parameter mapping; remove it",
    "zero_optimization.elastic_checkpoint": "checkpoints here resume at any world size; remove it",
    "zero_optimization.zenflow": "masked updates are not defined for it; remove it",
    "zero_optimization.mics_shard_size": "MiCS is not supported; use stage 3",
    "zero_optimization.zero_quantized_gradients": "it changes the gradients; remove it",
    "zero_optimization.zero_quantized_weights": "it rounds the complement; remove it",
    "bf16.bf16_master_weights_and_grads": "use pmp_ds.compact_master instead",
    "bf16.bf16_optimizer_states": "moments stay fp32; use pmp_ds.compact_master to save memory",
    "communication_data_type": "it rounds gradients; remove it",
    "prescale_gradients": "it changes how gradients are rounded; remove it",
    "sparse_gradients": "the ticket needs dense gradients; remove it",
    "data_types": "the recipe's train.precision decides",
    "amp": "the recipe's train.precision decides",
    "torch_autocast": "the recipe's train.precision decides",
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON as a dict; raises UserError when it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"--deepspeed-config {path}: no such file; ds_configs/ has one per ZeRO stage"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed-config {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"--deepspeed-config {path} must hold a JSON object")
    return value


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def merge(ds_config: dict[str, Any], config: TrainConfig, world_size: int) -> dict[str, Any]:
    """``ds_config`` completed from the recipe, for ``deepspeed.initialize``.

    Raises UserError that lists every disagreement and every refused section at once.
    """
    cut = Cut.of(config, world_size)
    owned: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": cut.accumulation_steps,
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }
    problems = [
        f"{name}: {reason}" for name, reason in _REFUSED.items() if _lookup(ds_config, name)
    ]
    derived = {"train_micro_batch_size_per_gpu": cut.micro_batch_size}
    for name, value in owned.items():
        given = ds_config.get(name, "auto")
        if given not in ("auto", derived.get(name)) and not _agrees(given, value):
            problems.append(f"{name} is {json.dumps(given)}, the recipe says {json.dumps(value)}")
    zero = ds_config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        problems.append("zero_optimization.stage must be 0, 1, 2 or 3")
    else:
        problems += _zero_problems(zero, config)
    problems += _own_problems(ds_config, config)
    if problems:
        raise UserError(
            "the DeepSpeed JSON says how the run fits on the machine, the recipe what is learned; "
            "leave these out or set them to \"auto\":\n  " + "\n  ".join(problems)
        )  # fmt: skip
    # DeepSpeed refuses a batch that is not micro x accumulation x ranks; it only counts with it.
    owned |= derived | {"train_batch_size": cut.rows * world_size}
    merged = {name: value for name, value in ds_config.items() if name != OWN_SECTION} | owned
    for name in ("bf16", "fp16"):  # sections: the JSON's other settings stay
        given = ds_config.get(name)
        merged[name] = (given if isinstance(given, dict) else {}) | owned[name]
    if config.precision == "fp32":
        del merged["bf16"], merged["fp16"]
    elif config.accumulate_fp32:
        merged["data_types"] = {"grad_accum_dtype": "fp32"}
    if zero.get("stage", 0) in (1, 2):
        merged["zero_optimization"] = {"overlap_comm": False} | zero
    return merged | {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # under offload, ours instead of DeepSpeedCPUAdam
        "steps_per_print": 10**9,
    }


def wants_compact_master(ds_config: dict[str, Any]) -> bool:
    """Whether the fp32 master weights are kept for the ticket alone: `pmp_ds.compact_master`."""
    return bool((ds_config.get(OWN_SECTION) or {}).get("compact_master", False))


def _own_problems(ds_config: dict[str, Any], config: TrainConfig) -> list[str]:
    section = ds_config.get(OWN_SECTION, {})
    if not isinstance(section, dict) or not set(section) <= {"compact_master"}:
        return [f"{OWN_SECTION} is {json.dumps(section)}; it holds compact_master alone"]
    problems = []
    if wants_compact_master(ds_config):
        if config.precision == "fp32" or zero_stage(ds_config) == 0:
            problems.append(f"{OWN_SECTION}.compact_master needs bf16 or fp16 and stage 1, 2 or 3")
        if config.accumulate_fp32:
            problems.append(f"{OWN_SECTION}.compact_master does not go with train.accumulate_fp32")
    return problems


def _zero_problems(zero: dict[str, Any], config: TrainConfig) -> list[str]:
    stage = zero.get("stage", 0)
    problems = []
    if stage in (1, 2) and zero.get("overlap_comm"):
        problems.append("zero_optimization.overlap_comm is not safe at stages 1 and 2; remove it")
    if zero.get("zero_hpz_partition_size", 1) != 1:
        problems.append("zero_optimization.zero_hpz_partition_size is not supported; remove it")
    if stage == 0 and config.precision == "fp16":
        problems.append("fp16 needs stage 1, 2 or 3: stage 0 unscales what it did not scale")
    if stage <= 1 and config.precision == "bf16" and config.accumulate_fp32:
        problems.append("train.accumulate_fp32 with bf16 needs stage 2 or 3: set either")
    return problems + _offload_problems(zero)


def _offload_problems(zero: dict[str, Any]) -> list[str]:
    problems = []
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(name) or {}
        device = section.get("device", "none")
        if device not in ("none", "cpu"):
            problems.append(f"zero_optimization.{name}.device is {device!r}; only cpu is supported")
        if device == "cpu" and zero.get("stage", 0) < lowest:
            problems.append(f"zero_optimization.{name} needs stage {lowest} or higher")
        if section.get("ratio", 1.0) != 1.0:
            problems.append(f"zero_optimization.{name}.ratio is not supported; remove it")
    if (zero.get("offload_param") or {}).get("device") == "cpu" and (
        zero.get("offload_optimizer") or {}
    ).get("device") != "cpu":
        problems.append("zero_optimization.offload_param needs offload_optimizer on cpu as well")
    return problems


def _lookup(ds_config: dict[str, Any], dotted: str) -> Any:
    value: Any = ds_config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _agrees(given: Any, value: Any) -> bool:
    """Whether a JSON value repeats the recipe's; sections are compared by the recipe's keys."""
    if isinstance(value, dict):
        return isinstance(given, dict) and all(
            given.get(key, "auto") in ("auto", wanted) for key, wanted in value.items()
        )
    return bool(given == value)
