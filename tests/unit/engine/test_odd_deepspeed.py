"""A DeepSpeed JSON is valid, or refused before anything is written, with all mistakes at once."""

import os
import sys
from pathlib import Path

import pytest

from pmp_ds import dist
from pmp_ds.commands import pretrain
from pmp_ds.config import TrainConfig
from pmp_ds.engine import deepspeed_keys
from pmp_ds.engine.deepspeed_config import OWN_SECTION, merge, read_json, require_precision
from pmp_ds.engine.deepspeed_refused import REFUSED
from pmp_ds.errors import UserError, exit_code
from tests.helpers import odd_deepspeed
from tests.helpers.faults import seen


def test_odd_values_of_every_key(tmp_path: Path):
    """3,800 files; `make crafted` counts them."""
    bad = []
    for one in odd_deepspeed.odd():
        words = ""
        try:
            one.open(tmp_path)
        except UserError as error:
            words = str(error)
            if not all(line.isprintable() for line in words.splitlines()):
                bad.append(f"{one.name}: {words!r}")
        except BaseException as error:  # noqa: BLE001 - whatever it is
            bad.append(f"{one.name}: {error!r}")
            continue
        if one.kind == "misspelt":
            assert (
                "does not know this key" in words
                or "only master" in words
                or (
                    "remove it" in words  # the section above is refused already
                )
            ), (one.text, words)
        if one.kind == "duplicate":
            assert "appears twice" in words, (one.text, words)
    assert bad == []


def test_deepspeed_reads_no_other_key():
    """When this fails, a new DeepSpeed reads more: support the key, or refuse it with a reason."""
    dist.import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    content = {"flops_profiler": odd_deepspeed.Asked({})}
    top = odd_deepspeed.Asked({"train_batch_size": 1, **content})
    DeepSpeedConfig(top)
    known = {key for key in odd_deepspeed.every_key() if "." not in key}
    assert top.keys_asked - known - set(REFUSED) == set()
    for name, section in content.items():
        fields = {key for key in odd_deepspeed.every_key() if key.startswith(f"{name}.")}
        assert {f"{name}.{key}" for key in section.keys_asked} == fields


def refusal(ds_config: dict, precision: str = "bf16") -> list[str]:
    config = TrainConfig(global_batch_size=4, micro_batch_size=4, precision=precision)
    with pytest.raises(UserError) as caught:
        merge(ds_config, config, 1)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_all_mistakes_in_one_list():
    lines = refusal(
        {
            "zero_optimisation": {"stage": 2},
            "elasticity": {"enabled": True},
            "zero_optimization": {
                "stage": 2,
                "reduce_buket_size": 1,
                "reduce_bucket_size": -1,
                "offload_optimizer": {"devise": "cpu"},
            },
            "fp16": {"loss_scale": 128},
            "wall_clock_breakdown": "yes",
        }
    )
    assert sorted(line.partition(":")[0] for line in lines) == sorted(
        [
            "zero_optimisation",
            "elasticity",
            "zero_optimization.reduce_buket_size",
            "zero_optimization.reduce_bucket_size",
            "zero_optimization.offload_optimizer.devise",
            "fp16.loss_scale",
            "wall_clock_breakdown",
        ]
    )
    seen("misspelt key", 1, "\n".join(lines))
    seen("unsupported section", 1, "\n".join(lines))
    seen("static loss scale", 1, "\n".join(lines))
    assert "did you mean zero_optimization.offload_optimizer.device?" in "\n".join(lines)


@pytest.mark.parametrize("name", [name for name in REFUSED if "." not in name])
def test_switched_off_is_left_out(name: str):
    config = TrainConfig(global_batch_size=4, micro_batch_size=4)
    off: tuple[object, ...] = (False, None, {}, {"enabled": False})
    assert all(name not in merge({name: value}, config, 1) for value in off)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_scale_power", 1000),
        ("hysteresis", 0),
        ("loss_scale_window", 0),
        ("min_loss_scale", -1),
        ("loss_scale", True),
        ("loss_scale", "auto"),
    ],
)
def test_fp16(name: str, value: object):
    ds_config = {"zero_optimization": {"stage": 2}, "fp16": {name: value}}
    if value == "auto":
        config = TrainConfig(global_batch_size=4, micro_batch_size=4, precision="fp16")
        assert "loss_scale" not in merge(ds_config, config, 1)["fp16"]
        return
    (line,) = refusal(ds_config, "fp16")
    assert line.startswith(f"fp16.{name}")


def test_fp16_on_a_device_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    accelerator = dist.import_deepspeed().get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    require_precision(TrainConfig(precision="bf16"))
    code = exit_code(lambda: require_precision(TrainConfig(precision="fp16")))
    seen("no fp16", code, capsys.readouterr().err)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_is_written(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 2}, "zero_optimisation": {"stage": 3}}'
        if precision == "bf16"
        else '{"zero_optimization": {"stage": 2}}'
    )
    accelerator = dist.import_deepspeed().get_accelerator()
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda: False)
    words = ["--deepspeed-config", "ds.json", "--train.precision", precision]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(UserError, match=r"zero_optimisation|precision=fp16"):
        pretrain.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]


def test_not_a_file(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot be read: .* is not a regular file"):
            read_json(path)


def test_the_section_of_ours():
    assert OWN_SECTION not in deepspeed_keys._top().model_fields
    (line,) = refusal({OWN_SECTION: {"compact_master": 1}})
    assert line == "pmp_ds.compact_master is 1; it must be true or false"
    (line,) = refusal({OWN_SECTION: {"master": "halved"}})
    assert line == 'pmp_ds.master is "halved"; it must be one of dense, compact, split'
    (line,) = refusal({OWN_SECTION: {"master": "split", "compact_master": True}})
    assert line == "pmp_ds has both master and compact_master; keep master"
