"""Check the keys and values of a DeepSpeed JSON against DeepSpeed's own pydantic models.

    lines = problems(ds_config, known=())    # one line per unknown key or wrong value

An upgrade of DeepSpeed brings its new keys along. Where DeepSpeed 0.19.8 has only constants, this
file defines the models, and a test fails when DeepSpeed reads more keys.
"""

import difflib
import functools
import json
import typing
from collections.abc import Collection
from typing import Any

from pmp_ds import dist


def problems(ds_config: dict[str, Any], known: Collection[str]) -> list[str]:
    """Return one line for each key that DeepSpeed does not know or whose value has the wrong type.
    ``known`` are other keys to suggest for a misspelt one."""
    found: list[str] = []
    clean = _walk(ds_config, _top(), "", known, found)
    from pydantic import ValidationError

    try:
        _top()(**clean)
    except ValidationError as error:
        for one in error.errors():
            where = ".".join(map(str, one["loc"])) or "DeepSpeed"
            words = one["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            found.append(f"{where}: {words}, got {_shown(one['input'])}")
    except (AssertionError, AttributeError, TypeError) as error:
        found.append(f"DeepSpeed: {error}")
    return found


@functools.cache
def _top() -> Any:
    """Return the model of the whole JSON, without refused sections."""
    dist.import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
    from pydantic import Field, create_model

    def model(name: str, kinds: dict[str, Any]) -> Any:
        unset = Field(None, validate_default=False)
        fields: dict[str, Any] = {key: (kind, unset) for key, kind in kinds.items()}
        return create_model(name, __base__=DeepSpeedConfigModel, **fields)

    monitors = DeepSpeedMonitorConfig.model_fields
    flops = {
        "enabled": bool,
        "detailed": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "output_file": str | None,
    }
    counts = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
    )
    switches = (
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    )
    return model(
        "DeepSpeedJson",
        {
            **dict.fromkeys(counts, int),
            **dict.fromkeys(switches, bool),
            "gradient_clipping": float,
            "log_level": str,
            "zero_optimization": DeepSpeedZeroConfig,
            "bf16": DeepSpeedBF16Config,
            "fp16": DeepSpeedFP16Config,
            "comms_logger": CommsLoggerConfig,
            "timers": model("Timers", {"throughput": DeepSpeedThroughputTimerConfig}),
            **{name: field.annotation for name, field in monitors.items()},
            "flops_profiler": model("Flops", flops),
        },
    )


def _walk(
    given: dict[str, Any], model: Any, above: str, known: Collection[str], found: list[str]
) -> dict[str, Any]:
    """Add a line to ``found`` for each bad entry of a section; return the others."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    names = {name: field.alias or name for name, field in model.model_fields.items()}
    clean = {}
    for key, value in given.items():
        where, field = f"{above}{key}", fields.get(names.get(key, key))
        if field is None:
            close = difflib.get_close_matches(key, [*fields, *known], n=1)
            guess = f": did you mean {above}{close[0]}?" if close else "; remove it"
            found.append(f"{where}: DeepSpeed does not know this key{guess}")
            continue
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            found.append(f"{where} is deprecated: write {extra.get('new_param') or 'nothing'}")
            continue
        kinds = _kinds(field.annotation)
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if section is not None and isinstance(value, dict):
            clean[key] = _walk(value, section, f"{where}.", (), found)
        elif value == "auto" or not (wanted := _not_of(value, kinds)):
            clean[key] = value
        else:
            found.append(f"{where}: expected {wanted}, got {_shown(value)}")
    return clean


def _kinds(annotation: Any) -> list[Any]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) in (list, dict, typing.Literal) or not inner:
        return [typing.get_origin(annotation) or annotation]
    return [kind for one in inner for kind in _kinds(one)]


def _not_of(value: Any, kinds: list[Any]) -> str | None:
    """Return the expected type, or None if ``value`` has it; pydantic would convert "yes" and 1."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "an object",
        list: "a list",
        type(None): "null",
    }

    def plain(kind: Any) -> Any:
        if not isinstance(kind, type):
            return str
        if hasattr(kind, "model_fields"):
            return dict
        return next((name for name in names if issubclass(kind, name)), str)

    wanted = {plain(kind) for kind in kinds}
    fits = {type(value)} & wanted or (
        type(value) in (int, float) and {int, float} & wanted  # 5e8 counts as a whole number
    )
    return None if fits else " or ".join(text for kind, text in names.items() if kind in wanted)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
