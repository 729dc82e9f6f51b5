"""The DeepSpeed JSON: how a run fits on the machine. The recipe says what is learned.

The JSON must not repeat, contradict or extend the recipe's settings; one error lists every
disagreement. All other settings reach DeepSpeed unchanged.
"""

import json
import math
from pathlib import Path
from typing import Any

from pmp_ds import dist, shipped
from pmp_ds.config import TrainConfig
from pmp_ds.config.precision import PRECISIONS, precision_of
from pmp_ds.engine import deepspeed_keys, deepspeed_refused
from pmp_ds.engine.cut import Cut
from pmp_ds.engine.deepspeed_refused import REFUSED
from pmp_ds.errors import UserError, require
from pmp_ds.foreign import ForeignError, MissingError, read_bytes
from pmp_ds.optim.kernels.batch import MASTERS, SPLIT, Master

OWN_SECTION = "pmp_ds"  # our settings in the JSON; DeepSpeed never sees them
MAX_BYTES = 1 << 18
_SECTIONS = [one.section for one in PRECISIONS.values() if one.section]
_MAX_BUCKET = 1 << 40  # elements: more than any machine holds


def read_json(given: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file, or of a shipped one by name such as `zero2`. Raises
    UserError when it is missing or not a plain JSON object."""
    name = f"--deepspeed-config {given}"
    try:
        text = read_bytes(shipped.ds_config(str(given)), MAX_BYTES).decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_small,
        )
    except MissingError:
        known = ", ".join(shipped.ds_configs())
        raise UserError(f"{name}: no such file; files by name: {known}") from None
    except ForeignError as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply for a DeepSpeed JSON") from None
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} must hold a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for key in found:
        require(sum(key == one for one, _ in pairs) == 1, f"{key!r} appears twice; remove one")
    return found


def _no_number(word: str) -> Any:
    raise UserError(f"{word} is not a number in JSON")


def _finite(text: str) -> float:
    require(math.isfinite(float(text)), f"{text} is too large")
    return float(text)


def _small(text: str) -> int:
    require(len(text) < 20 and abs(int(text)) < 2**63, f"{text[:20]}... is too large")
    return int(text)


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def merge(ds_config: dict[str, Any], config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Return ``ds_config`` completed from the recipe, for ``deepspeed.initialize``.

    Raises one UserError for all disagreements and refused sections.
    """
    cut, precision = Cut.of(config, world_size), precision_of(config)
    auto = config.micro_batch_size == "auto"  # which numbers it gives is not known yet
    owned: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": "auto" if auto else cut.accumulation_steps,
        "gradient_clipping": config.clip_norm,
        **{name: {"enabled": name == precision.section} for name in _SECTIONS},
    }
    problems = deepspeed_refused.problems(ds_config)
    ds_config = _without_auto(deepspeed_refused.without(ds_config))
    derived = {"train_micro_batch_size_per_gpu": cut.micro_batch_size}
    for name, value in owned.items():
        given = ds_config.get(name, "auto")
        if given not in ("auto", None if auto else derived.get(name)) and not _agrees(given, value):
            problems.append(f"{name} is {json.dumps(given)}, the recipe says {json.dumps(value)}")
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append("zero_optimization.stage must be 0, 1, 2 or 3")
    elif not (odd := deepspeed_keys.problems({"zero_optimization": zero}, ())):
        problems += _zero_problems(zero, config)
    else:
        problems += odd
    rest = {n: v for n, v in ds_config.items() if n not in ("zero_optimization", OWN_SECTION)}
    odd = deepspeed_keys.problems(rest, [*REFUSED, OWN_SECTION])
    problems += odd or _fp16_problems(ds_config)
    problems += _own_problems(ds_config, config)
    if problems:
        raise UserError(
            "the DeepSpeed JSON says how the run fits on the machine, the recipe what is learned; "
            'remove these from the JSON or set them to "auto":\n  ' + "\n  ".join(problems)
        )
    # DeepSpeed 0.19.8 requires train_batch_size = micro x accumulation x ranks, which includes
    # repeated rows, and only counts samples with it.
    owned |= derived | {"train_batch_size": cut.rows * world_size}
    merged = {name: value for name, value in ds_config.items() if name != OWN_SECTION} | owned
    for name in _SECTIONS:  # the JSON's other settings stay
        given = ds_config.get(name)
        merged[name] = (given if isinstance(given, dict) else {}) | owned[name]
    if precision.section is None:
        for name in _SECTIONS:
            del merged[name]
    elif config.accumulate_fp32:
        merged["data_types"] = {"grad_accum_dtype": "fp32"}
    if zero.get("stage", 0) in (1, 2):
        merged["zero_optimization"] = {"overlap_comm": False} | zero
    # DeepSpeed 0.19.8 would wait for the device in every micro-batch, for a rate that we log too.
    merged.setdefault("timers", {"throughput": {"enabled": False}})
    return merged | {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # allows our optimizer under CPU offload
        "steps_per_print": 10**9,
    }


def master_of(ds_config: dict[str, Any]) -> Master:
    """Return where `pmp_ds.master` keeps the fp32 master weights: `dense`, or only for the ticket,
    `compact` or `split`. `compact_master: true` is an older way to write the second."""
    section = ds_config.get(OWN_SECTION) or {}
    older: Master = "compact" if section.get("compact_master", False) else "dense"
    found: Master = section.get("master", older)
    return found


def require_precision(config: TrainConfig) -> None:
    """Raise UserError when this machine's devices do not support ``train.precision``."""
    accelerator, name = dist.import_deepspeed().get_accelerator(), precision_of(config).section
    require(
        name is None or bool(getattr(accelerator, f"is_{name}_supported")()),
        f"train.precision={config.precision} is not supported on {accelerator.device_name()} here: "
        "use bf16 or fp32",
    )


def _fp16_problems(ds_config: dict[str, Any]) -> list[str]:
    """Check bounds that DeepSpeed 0.19.8 does not: it would divide by a scale of 0 or infinity."""
    section = ds_config.get("fp16")
    if not isinstance(section, dict):
        return []
    bounds = {
        "initial_scale_power": (0, 127),
        "loss_scale_window": (1, 2**31),
        "hysteresis": (1, 2**31),
        "min_loss_scale": (1, 2**31),
    }
    return [
        f"fp16.{name} is {section[name]}; it must be between {low} and {high}"
        for name, (low, high) in bounds.items()
        if name in section and not low <= section[name] <= high
    ]


def _own_problems(ds_config: dict[str, Any], config: TrainConfig) -> list[str]:
    section = ds_config.get(OWN_SECTION, {})
    if not isinstance(section, dict) or not set(section) <= {"master", "compact_master"}:
        return [f"{OWN_SECTION} is {json.dumps(section)}; it may contain only master"]
    problems = []
    given = section.get("master", "dense")
    if not isinstance(given, str) or given not in MASTERS:
        given, known = json.dumps(section["master"]), ", ".join(MASTERS)
        problems.append(f"{OWN_SECTION}.master is {given}; it must be one of {known}")
    if not isinstance(section.get("compact_master", False), bool):
        given = json.dumps(section["compact_master"])
        problems.append(f"{OWN_SECTION}.compact_master is {given}; it must be true or false")
    if len(section) == 2:
        problems.append(f"{OWN_SECTION} has both master and compact_master; keep master")
    if problems or (master := master_of(ds_config)) == "dense":
        return problems
    what = f"{OWN_SECTION}.master {master}"
    if not precision_of(config).has_master or zero_stage(ds_config) == 0:
        problems.append(f"{what} needs bf16 or fp16 and stage 1, 2 or 3")
    elif master == "split" and precision_of(config).dtype != SPLIT:
        problems.append(f"{what} needs bf16, not {config.precision}; choose compact")
    if config.accumulate_fp32:
        problems.append(f"{what} excludes train.accumulate_fp32")
    return problems


def _zero_problems(zero: dict[str, Any], config: TrainConfig) -> list[str]:
    stage = zero.get("stage", 0)
    problems = []
    problems += [
        f"zero_optimization.{name} is {zero[name]}; it must be at most {_MAX_BUCKET} elements"
        for name in ("reduce_bucket_size", "allgather_bucket_size")
        if zero.get(name, 0) > _MAX_BUCKET
    ]
    if stage == 0 and precision_of(config).scales_loss:
        problems.append("fp16 needs stage 1, 2 or 3: stage 0 unscales gradients it did not scale")
    if stage == 3 and config.activation_checkpointing == "selective":
        problems.append(
            "train.activation_checkpointing=selective works at stages 0 to 2, not at 3, where the "
            "layers gather their parameters; choose full"
        )
    if stage <= 1 and config.precision == "bf16" and config.accumulate_fp32:
        problems.append("train.accumulate_fp32 with bf16 needs stage 2 or 3; change one of them")
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


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    """Drop "auto" values, left to the recipe or DeepSpeed; only ``stage`` must be explicit."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto" or key in ("zero_optimization", "stage")
    }


def _agrees(given: Any, value: Any) -> bool:
    """Return whether a JSON value repeats the recipe's; sections compare by the recipe's keys."""
    if isinstance(value, dict):
        return isinstance(given, dict) and all(
            given.get(key, "auto") in ("auto", wanted) for key, wanted in value.items()
        )
    return bool(given == value)
