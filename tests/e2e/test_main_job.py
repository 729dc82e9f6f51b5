"""The main job as a user types it: prepare, pretrain on two ranks, export, report."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pmp_ds.data.arrow_store import Store
from pmp_ds.log import read_metrics
from pmp_ds.model.parameters import parameter_table
from pmp_ds.run_dir import RunDir
from pmp_ds.state.weight_files import read_weights
from pmp_ds.ticket.ticket import Ticket, load_ticket
from pmp_ds.train.planned import plan_of
from tests.e2e.conftest import MainRun
from tests.helpers import tiny
from tests.helpers.commands import files_of, ok
from tests.helpers.forks import command
from tests.helpers.workdir import BLOCK, STEPS

pytestmark = pytest.mark.e2e

STEP_FIELDS = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "loader_share"}
STEP_FIELDS |= {"optimizer_share", "peak_host_memory"}


def rows(run: RunDir, phase: str, field: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run.metrics) if r["phase"] == phase and field in r]


def initial_weights(run: RunDir) -> dict[str, torch.Tensor]:
    """Draw theta(0) again from the run's key."""
    return {name: param.detach() for name, param in tiny.at_theta0(run).named_parameters()}


def final_weights(run: RunDir, step: int = STEPS) -> dict[str, torch.Tensor]:
    stored = read_weights(run.checkpoints / f"update-{step:08d}" / "weights")
    return {name: stored(name) for name in initial_weights(run)}


@pytest.fixture(scope="module")
def ticket(main_run: MainRun) -> Ticket:
    return load_ticket(main_run.run.ticket)


def test_metrics_of_every_update(main_run: MainRun):
    run = main_run.run
    discovered = rows(run, "discover", "loss")
    assert [r["step"] for r in discovered] == list(range(1, len(discovered) + 1))
    assert [r["step"] for r in rows(run, "discover", "iou")] == list(range(2, len(discovered) + 1))
    trained = rows(run, "train", "loss")
    assert [r["step"] for r in trained] == list(range(1, STEPS + 1))
    assert all(r.keys() == STEP_FIELDS | {"phase", "step", "time", "start"} for r in trained)
    assert [r["tokens"] for r in trained] == [s * 8 * BLOCK for s in range(1, STEPS + 1)]
    assert all(r["grad_norm"] > 0 and r["tokens_per_second"] > 0 for r in trained)
    assert all(0 <= r["loader_share"] <= 1 for r in trained)
    assert trained[3]["lr"] == 1e-2
    assert [r["step"] for r in rows(run, "train", "val_loss")] == list(range(0, STEPS + 1, 10))


def test_the_start_is_told_by_parts(main_run: MainRun):
    """Once, by rank 0, and the parts are the whole."""
    said = re.findall(r"first update after ([\d.]+) s: (.*)", main_run.train.stdout)
    assert len(said) == 1
    parts = dict(re.findall(r"(?:^|, )(.+?) ([\d.]+) s", said[0][1]))
    assert list(parts) == [
        "imports and settings",
        "meeting",
        "rehearsal of the release",
        "data",
        "theta(0)",
        "engine",
        "first update",
    ]
    assert abs(sum(map(float, parts.values())) - float(said[0][0])) < 0.05 * len(parts) + 0.06


def test_the_loss_beats_token_frequencies(main_run: MainRun, work: Path):
    unigram = Store.open(work / "store").unigram_cross_entropy
    for name in ("loss", "val_loss"):
        values = [r[name] for r in rows(main_run.run, "train", name)]
        assert values[0] > unigram > values[-1]


def test_tensorboard_holds_the_same_scalars(main_run: MainRun):
    board = EventAccumulator(str(main_run.run.tensorboard))
    board.Reload()
    rates = {"tokens_per_second", "loader_share", "optimizer_share", "peak_host_memory"}
    system = rates | {"save_stall_seconds", "save_seconds"}
    expected = {f"system/{name}": ("train", name) for name in system}
    expected |= {f"train/{name}": ("train", name) for name in STEP_FIELDS - rates}
    expected |= {f"discovery/{name}": ("discover", name) for name in ("loss", "iou")}
    expected["eval/val_loss"] = "train", "val_loss"
    assert set(board.Tags()["scalars"]) == set(expected)
    assert {kind for kind, tags in board.Tags().items() if tags} == {"scalars"}
    for tag, (phase, name) in expected.items():
        wanted = {r["step"]: r[name] for r in rows(main_run.run, phase, name)}
        found = {event.step: event.value for event in board.Scalars(tag)}
        assert found == pytest.approx(wanted, rel=1e-6)


def test_pictures(main_run: MainRun):
    assert sorted(p.name for p in main_run.run.plots.iterdir()) == ["iou.png", "loss.png"]
    for path in main_run.run.plots.iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        assert 600 <= width <= 2000
        assert 300 <= height <= 1500
        assert 5_000 < len(data) < 500_000


def test_the_plan_comes_first_and_once(main_run: MainRun, ticket: Ticket):
    out, d, k = main_run.train.stdout, ticket.mask.num_params, ticket.mask.num_kept
    plan = out[out.index("main:\n") : out.index("done: ")]
    for row in (
        "2 sequences x 2 accumulation steps x 2 ranks = 8 sequences x 32 tokens = 256 tokens",
        f"updates    {STEPS}, {STEPS * 256:,} tokens",
        f"parameters d = {d:,}",
        f"ticket     k = {k:,} of {d:,}, density 0.7000",
        "engine     DeepSpeed ZeRO 1, 2 ranks, fp32, cpu",
        "memory     per rank",
        "secrecy    theta(0) from a secret key",
        "writes     runs/main/",
    ):
        assert plan.count(row) == out.count(row) == 1
    assert f"ticket of {k:,} elements of {d:,}, 0 elements of the complement changed" in out
    assert "next: pmp-ds export --run runs/main" in out
    assert "pmp-ds vault show runs/main/private/ticket" in out


def test_the_page_compares_the_plan_with_the_files(main_run: MainRun, tmp_path: Path):
    run = main_run.run
    plan = plan_of(run)
    assert plan is not None
    public = shutil.copytree(run.root, tmp_path / "public", ignore=lambda *_: {"private"})
    assert plan_of(RunDir(public)) == plan, "it depends on secrets"
    (newest,) = run.checkpoints.glob(f"update-{STEPS:08d}")
    headers = 0.1  # of the small files of a tiny model
    for planned, folder in ((plan.checkpoint, newest), (plan.release, run.release)):
        tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        assert 1.0 <= tensors / planned < 1.0 + headers, folder
    measured = max(r["peak_host_memory"] for r in rows(run, "train", "peak_host_memory"))
    assert plan.started.host_memory_before < plan.host_memory < 1.2 * measured
    page = run.report.read_text()
    for number in (plan.updates, plan.tokens, plan.checkpoint, plan.release):
        assert f"<td>{number:,}</td>" in page
    assert (plan.updates, plan.tokens) == (STEPS, STEPS * 8 * BLOCK)
    assert (plan.started.ranks, plan.started.device, plan.started.micro_batch_size) == (2, "cpu", 2)
    assert plan.has_activations
    assert plan.device_memory is None


def test_one_rank_shows_progress(main_run: MainRun):
    err = main_run.train.stderr
    assert len(re.findall(r"^\S+Z train: 100% 40/40 .*loss=.*val=", err, re.MULTILINE)) == 1
    assert len(re.findall(r"^\S+Z discover: .*iou=0\.9", err, re.MULTILINE)) == 1
    assert "arning" not in err + main_run.train.stdout.split("main:\n")[1]


def test_private_files_are_private(main_run: MainRun):
    private = main_run.run.private
    for path in (private, *private.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert sorted(p.name for p in private.iterdir()) == [
        "checkpoints",
        "init",
        "ledger.jsonl",
        "ticket",
    ]
    assert sorted(p.name for p in main_run.run.checkpoints.iterdir()) == [
        "latest",
        "update-00000030",
        "update-00000040",
    ]


def test_only_the_ticket_was_trained(main_run: MainRun, ticket: Ticket):
    first, last = initial_weights(main_run.run), final_weights(main_run.run)
    constants = {p.name for p in parameter_table(tiny.at_theta0(main_run.run)) if p.constant}
    moved = kept = 0
    for name, before in first.items():
        mask = ticket.mask.full(name)
        assert torch.equal(last[name][~mask].view(torch.int32), before[~mask].view(torch.int32))
        moved += int((last[name] != before)[mask].sum())
        kept += int(mask.sum())
        assert name not in constants or bool(mask.all())
    assert constants
    assert kept == ticket.mask.num_kept == 7 * ticket.mask.num_params // 10
    assert moved > 0.9 * kept
    assert (ticket.source, ticket.stable, ticket.density) == ("earlybird", True, 0.7)
    ious = [r["iou"] for r in rows(main_run.run, "discover", "iou")]
    assert ticket.step == len(ious) + 1
    assert min(ious[-2:]) >= 0.9


def test_the_report_states_everything(main_run: MainRun, ticket: Ticket, work: Path):
    report, run = main_run.report.stdout, main_run.run
    row = dict(re.findall(r"^  (\w+) +(.*)$", report, re.MULTILINE))
    manifest = json.loads((work / "store" / "manifest.json").read_text())
    blocks = sum(split["blocks"] for split in manifest["splits"].values())
    assert row["data"] == f"400 documents, {blocks * BLOCK:,} tokens in {blocks:,} blocks of 32"
    d, k = ticket.mask.num_params, ticket.mask.num_kept
    assert row["parameters"] == f"d = {d:,}"
    assert row["ticket"] == f"k = {k:,}, ones counted in the ticket {k:,} (equal)"
    trace = " ".join(f"{r['iou']:.3f}" for r in rows(run, "discover", "iou"))
    assert row["drawn"] == (
        f"after update {ticket.step} of discovery, stable; IoU from update 2 on: {trace}"
    )
    assert row["complement"] == f"0 of {d - k:,} elements changed in {STEPS} updates"
    unigram = manifest["unigram_cross_entropy"]
    for label, name in (("training", "loss"), ("validation", "val_loss")):
        values = [r[name] for r in rows(run, "train", name)]
        assert row[label].startswith(f"{values[0]:.3f} -> {values[-1]:.3f} nats per token")
        assert f"{unigram:.3f}" in row[label]
    assert row["pictures"] == "runs/main/plots/iou.png, runs/main/plots/loss.png"
    assert row["release"].startswith("runs/main/release/: README.md, SHA256SUMS, config.json")
    assert row["sample"].startswith("'kana ")
    assert main_run.report.stderr == ""


def test_config_repeats_the_run(main_run: MainRun, work: Path):
    run_dir = main_run.run
    before = files_of(run_dir.private, run_dir.release), run_dir.metrics.read_bytes()
    done = ok(command("pretrain.py", "--config", "runs/main/config.yaml", cwd=work))
    assert f"already finished: {STEPS} of {STEPS} updates" in done.stdout
    assert "0 elements of the complement changed" in done.stdout
    assert before == (files_of(run_dir.private, run_dir.release), run_dir.metrics.read_bytes())
