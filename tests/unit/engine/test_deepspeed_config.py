import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pmp_ds.config import TrainConfig
from pmp_ds.engine.deepspeed_config import (
    OWN_SECTION,
    master_of,
    merge,
    read_json,
    zero_stage,
)
from pmp_ds.errors import UserError

REPO = Path(__file__).resolve().parents[3]
JSONS = sorted((REPO / "ds_configs").glob("*.json"))

CONFIG = TrainConfig(global_batch_size=32, micro_batch_size=4, clip_norm=0.5, precision="bf16")
WORLD_SIZE = 2
OWNED = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}
OTHER = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": True},
}
REFUSED = {
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "amp": {"enabled": True},
    "torch_autocast": {"enabled": True},
}
REFUSED_IN_ZERO = {
    "round_robin_gradients": True,
    "elastic_checkpoint": True,
    "zenflow": {"topk_ratio": 0.1},
    "mics_shard_size": 2,
    "offload_optimizer": {"device": "nvme"},
    "zero_quantized_gradients": True,
    "zero_hpz_partition_size": 2,
}


def problems(ds_config: dict, config: TrainConfig = CONFIG) -> list[str]:
    """Return the listed lines of the one error."""
    with pytest.raises(UserError) as caught:
        merge(ds_config, config, WORLD_SIZE)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_empty_json_is_completed():
    merged = merge({}, CONFIG, WORLD_SIZE)
    assert {name: merged[name] for name in OWNED} == OWNED
    assert merged["zero_allow_untested_optimizer"] is True


def test_deepspeeds_throughput_timer_is_off_unless_asked_for():
    """It synchronizes the device around every micro-batch."""
    off, on = ({"throughput": {"enabled": enabled}} for enabled in (False, True))
    assert merge({}, CONFIG, WORLD_SIZE)["timers"] == off
    assert merge({"timers": on}, CONFIG, WORLD_SIZE)["timers"] == on


def test_auto_is_filled_in():
    assert merge(dict.fromkeys(OWNED, "auto"), CONFIG, WORLD_SIZE) == merge({}, CONFIG, WORLD_SIZE)
    inner = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    assert merge(inner, CONFIG, WORLD_SIZE) == merge({}, CONFIG, WORLD_SIZE)


def test_equal_values_are_accepted():
    assert merge(OWNED, CONFIG, WORLD_SIZE) == merge({}, CONFIG, WORLD_SIZE)


@pytest.mark.parametrize("name", OWNED)
def test_contradiction_shows_both_values(name):
    (line,) = problems({name: OTHER[name]})
    given, recipe = json.dumps(OTHER[name]), json.dumps(OWNED[name])
    assert line == f"{name} is {given}, the recipe says {recipe}"


def test_all_contradictions_in_one_error():
    assert [line.split()[0] for line in problems(OTHER)] == list(OTHER)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_section(name):
    (line,) = problems({name: REFUSED[name]})
    assert line.startswith(f"{name}: ")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", REFUSED_IN_ZERO)
def test_refused_zero_option(name, stage):
    (line,) = problems({"zero_optimization": {"stage": stage, name: REFUSED_IN_ZERO[name]}})
    assert line.startswith(f"zero_optimization.{name}")


@pytest.mark.parametrize("name", ["round_robin_gradients", "elastic_checkpoint"])
def test_switched_off_is_not_refused(name):
    merge({"zero_optimization": {"stage": 2, name: False}}, CONFIG, WORLD_SIZE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overlap_comm_is_the_users_choice(stage):
    for value in (True, False):
        given = {"zero_optimization": {"stage": stage, "overlap_comm": value}}
        assert merge(given, CONFIG, WORLD_SIZE)["zero_optimization"]["overlap_comm"] is value
    merged = merge({"zero_optimization": {"stage": stage}}, CONFIG, WORLD_SIZE)
    default = merged["zero_optimization"].get("overlap_comm")
    assert default is (None if stage == 3 else False), "DeepSpeed's at stage 3"


@pytest.mark.parametrize("zero", [{"stage": 4}, {"stage": "2"}, {"stage": None}, [], None, "auto"])
def test_unknown_stage(zero):
    (line,) = problems({"zero_optimization": zero})
    assert line == "zero_optimization.stage must be 0, 1, 2 or 3"


def test_everything_at_once():
    zero = {"stage": 2, **REFUSED_IN_ZERO}
    lines = problems(OTHER | REFUSED | {"zero_optimization": zero})
    named = [*OTHER, *REFUSED, *(f"zero_optimization.{name}" for name in zero if name != "stage")]
    assert sorted(line.split()[0].removesuffix(":").removesuffix(".device") for line in lines) == (
        sorted(named)
    )


def test_fp32_leaves_both_sections_out():
    """DeepSpeed's default is fp32; an explicit section may pick another wrapper."""
    config = TrainConfig(precision="fp32")
    for given in ({}, {"bf16": {"enabled": False}, "fp16": {"enabled": False}}, {"bf16": "auto"}):
        merged = merge(given, config, 1)
        assert "bf16" not in merged
        assert "fp16" not in merged
    assert (
        len(
            problems(
                {"bf16": {"enabled": True}},
                TrainConfig(precision="fp32", global_batch_size=64, micro_batch_size=32),
            )
        )
        == 1
    )


def stage(number: int, **options: object) -> dict:
    return {"zero_optimization": {"stage": number, **options}}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fp16(number):
    config = replace(CONFIG, precision="fp16")
    merged = merge(stage(number) | {"fp16": {"initial_scale_power": 8}}, config, WORLD_SIZE)
    assert merged["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert merged["bf16"] == {"enabled": False}


def test_fp16_needs_a_stage():
    (line,) = problems(stage(0), replace(CONFIG, precision="fp16"))
    assert "fp16 needs stage 1, 2 or 3" in line


def test_accumulate_fp32():
    config = replace(CONFIG, accumulate_fp32=True)
    assert merge(stage(2), config, WORLD_SIZE)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in merge(stage(2), CONFIG, WORLD_SIZE)
    for number in (0, 1):
        (line,) = problems(stage(number), config)
        assert "train.accumulate_fp32 with bf16 needs stage 2 or 3" in line


CPU = {"device": "cpu"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_optimizer_offload_to_cpu(number):
    merged = merge(stage(number, offload_optimizer=CPU), CONFIG, WORLD_SIZE)
    assert merged["zero_optimization"]["offload_optimizer"] == CPU
    assert merged["zero_force_ds_cpu_optimizer"] is False, "DeepSpeedCPUAdam would replace ours"


def test_parameter_offload_to_cpu():
    merge(stage(3, offload_optimizer=CPU, offload_param=CPU), CONFIG, WORLD_SIZE)
    (line,) = problems(stage(3, offload_param=CPU))
    assert "offload_param needs offload_optimizer" in line
    (line,) = problems(stage(2, offload_optimizer=CPU, offload_param=CPU))
    assert "offload_param needs stage 3" in line


def test_no_offload_spelled_out():
    none = {"device": "none"}
    merge(stage(3, offload_optimizer=none, offload_param=none), CONFIG, WORLD_SIZE)


@pytest.mark.parametrize(
    ("name", "section", "named"),
    [
        ("offload_optimizer", {"device": "nvme"}, "device is 'nvme'"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "ratio"),
        ("offload_param", {"device": "nvme"}, "device is 'nvme'"),
    ],
)
def test_refused_offload(name, section, named):
    (line,) = problems(stage(3, **{name: section}))
    assert line.startswith(f"zero_optimization.{name}")
    assert named in line


# 32 sequences over 3 ranks are 11, 11 and 10: 3 micro-batches of 4 rows, 12 rows on each rank.
UNEVEN = {
    "train_batch_size": 36,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
}


def test_batch_that_does_not_divide():
    """DeepSpeed gets numbers that multiply; the JSON may repeat the recipe's."""
    given = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}
    for ds_config in ({}, given, given | {"gradient_accumulation_steps": 3}):
        assert UNEVEN.items() <= merge(ds_config, CONFIG, 3).items()
    with pytest.raises(UserError, match="train_batch_size is 36, the recipe says 32"):
        merge({"train_batch_size": 36}, CONFIG, 3)
    with pytest.raises(UserError, match="gradient_accumulation_steps is 4, the recipe says 3"):
        merge({"gradient_accumulation_steps": 4}, CONFIG, 3)


def test_micro_batch_that_does_not_fit():
    """32 at most, 16 on each of 2 ranks: a JSON may name either."""
    config = replace(CONFIG, micro_batch_size=32)
    for given in ("auto", 16, 32):
        merged = merge({"train_micro_batch_size_per_gpu": given}, config, 2)
        assert merged["train_micro_batch_size_per_gpu"] == 16
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu is 8, the recipe says 32"):
        merge({"train_micro_batch_size_per_gpu": 8}, config, 2)


def test_more_ranks_than_sequences():
    merge({}, CONFIG, 32)
    with pytest.raises(UserError, match=r"=32 is less than .* 33 ranks: start at most 32"):
        merge({}, CONFIG, 33)


def test_the_rest_is_passed_on_and_nothing_is_changed_in_place():
    given = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 77},
        "flops_profiler": {"enabled": True},
        "wall_clock_breakdown": True,
        "bf16": "auto",
    }
    before = copy.deepcopy(given)
    merged = merge(given, CONFIG, WORLD_SIZE)
    assert given == before
    assert merged["zero_optimization"]["reduce_bucket_size"] == 77
    assert merged["flops_profiler"] == {"enabled": True}
    assert merged["wall_clock_breakdown"] is True


def test_zero_stage():
    assert zero_stage({}) == 0
    assert zero_stage({"zero_optimization": {}}) == 0
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3


def test_read_json(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    assert read_json(path) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,}', "is not JSON: .*line 1"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
)
def test_not_a_json_object(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read_json(tmp_path / "nowhere.json")


def test_one_json_per_stage():
    assert {zero_stage(read_json(path)) for path in JSONS} == {0, 1, 2, 3}


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_json(path, precision):
    ds_config = read_json(path)
    for name in OWNED:
        assert ds_config.get(name, "auto") == "auto", f"{path.name}: {name} is the recipe's"
    if master_of(ds_config) != "dense" and precision == "fp32":
        with pytest.raises(UserError, match=f"master {master_of(ds_config)} needs bf16 or fp16"):
            merge(ds_config, TrainConfig(precision=precision), 1)
        return
    merged = merge(ds_config, TrainConfig(precision=precision), 1)
    assert ("bf16" in merged) == (precision == "bf16")
    assert OWN_SECTION not in merged
    for name, value in ds_config.items():
        assert name in (*OWNED, OWN_SECTION) or merged[name] == value


@pytest.mark.parametrize(
    ("key", "number"), [("train_micro_batch_size_per_gpu", 32), ("gradient_accumulation_steps", 1)]
)
def test_a_number_beside_auto(key, number):
    """Even the numbers of a whole share: what fits is not known yet."""
    config = TrainConfig(global_batch_size=32, micro_batch_size="auto")
    with pytest.raises(UserError, match=rf'{key} is {number}, the recipe says "auto"'):
        merge({key: number}, config, 1)
    merge({key: "auto"}, config, 1)
