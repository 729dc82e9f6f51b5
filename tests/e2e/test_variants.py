"""Other sources of the mask, ZeRO stages, precision and model family, each from end to end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import has_ticket, load_ticket
from tests.e2e.conftest import MainRun
from tests.e2e.test_main_job import final_weights, initial_weights, rows
from tests.helpers.commands import DS_CONFIGS, RECIPES, call, ok
from tests.helpers.forks import command
from tests.helpers.workdir import SHORT

pytestmark = pytest.mark.e2e


def test_random_mask_at_stage_2(work: Path):
    done = ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--config",
            RECIPES / "random-mask.yaml",
            "--run.name",
            "random",
            *SHORT,
            "--deepspeed-config",
            DS_CONFIGS / "zero2.json",
            cwd=work,
            ranks=2,
        )
    )
    assert "ZeRO 2" in done.stdout
    assert "mask       random mask from a secret key" in done.stdout
    folder = RunDir(work / "runs" / "random")
    ticket = load_ticket(folder.ticket)
    assert (ticket.source, ticket.step, ticket.density) == ("random", None, 0.7)
    assert ticket.mask.num_kept == 7 * ticket.mask.num_params // 10
    assert "0 elements of the complement changed" in done.stdout
    assert rows(folder, "discover", "loss") == []
    assert [p.name for p in folder.plots.iterdir()] == ["loss.png"]


@pytest.mark.nightly
def test_base_at_stage_0(work: Path):
    done = ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--config",
            RECIPES / "base.yaml",
            "--run.name",
            "base",
            *SHORT,
            "--deepspeed-config",
            DS_CONFIGS / "zero0.json",
            cwd=work,
            ranks=2,
        )
    )
    assert "ZeRO 0" in done.stdout
    folder = RunDir(work / "runs" / "base")
    assert not has_ticket(folder.ticket)
    first, last = initial_weights(folder), final_weights(folder, 6)
    moved = sum(int((first[name] != last[name]).sum()) for name in first)
    assert moved > 0.9 * sum(tensor.numel() for tensor in first.values())
    report = ok(call("report.py", "--run", "runs/base", cwd=work)).stdout
    assert "none: every parameter was trained" in report
    assert "complement" not in report


@pytest.mark.nightly
def test_given_ticket_on_one_rank(main_run: MainRun, work: Path):
    """With another run's ticket ``mask.density`` does not matter."""
    done = ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--run.name",
            "given",
            "--mask.source",
            "file",
            "--mask.file",
            "runs/main/private/ticket",
            "--mask.density",
            "0.5",
            *SHORT,
            "--deepspeed-config",
            "zero1.json",
            cwd=work,
        )
    )
    given = load_ticket(main_run.run.ticket)
    used = load_ticket(RunDir(work / "runs" / "given").ticket)
    assert used.id == given.id
    assert f"ticket     k = {given.mask.num_kept:,} of" in done.stdout
    assert "1 rank," in done.stdout
    assert "0 elements of the complement changed" in done.stdout


@pytest.mark.usefixtures("reloaded_here")
def test_tied_gpt2_at_stage_3_in_bf16(work: Path):
    (work / "gpt2.yaml").write_text(
        "model: {family: gpt2, num_kv_heads: null, intermediate_size: null, tie_embeddings: true}\n"
        "train: {precision: bf16}\n"
    )
    done = ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--config",
            "gpt2.yaml",
            "--run.name",
            "gpt2",
            *SHORT,
            "--mask.max_steps",
            "6",
            "--mask.on_unstable",
            "last",
            "--deepspeed-config",
            "zero3.json",
            cwd=work,
            ranks=2,
        )
    )
    assert "ZeRO 3, 2 ranks, bf16" in done.stdout
    assert "0 elements of the complement changed" in done.stdout
    folder = RunDir(work / "runs" / "gpt2")
    ticket = load_ticket(folder.ticket)
    assert "lm_head.weight" not in ticket.mask.shapes
    first, last = initial_weights(folder), final_weights(folder, 6)
    for name, before in first.items():
        mask = ticket.mask.full(name)
        assert torch.equal(last[name][~mask], before.bfloat16()[~mask])
    ok(call("export.py", "--run", "runs/gpt2", cwd=work))
    released = load_file(folder.release / "model.safetensors")
    assert released.keys() == last.keys()
    assert all(torch.equal(released[name], last[name]) for name in last)
    assert sum(tensor.numel() for tensor in released.values()) == ticket.mask.num_params


@pytest.mark.nightly
def test_unstable_ticket_is_reported(work: Path):
    ok(
        command(
            "pretrain.py",
            "--config",
            "tiny.yaml",
            "--run.name",
            "unstable",
            *SHORT,
            "--mask.iou_threshold",
            "1.0",
            "--mask.on_unstable",
            "last",
            "--deepspeed-config",
            "zero1.json",
            cwd=work,
        )
    )
    report = ok(call("report.py", "--run", "runs/unstable", cwd=work)).stdout
    assert "after update 30 of discovery, NOT STABLE" in report
    assert "none yet: pmp-ds export --run runs/unstable" in report
