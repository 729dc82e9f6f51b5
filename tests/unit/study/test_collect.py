"""A finished run becomes a line of results.jsonl."""

from dataclasses import asdict
from pathlib import Path

import pytest

from pmp_ds import results
from pmp_ds.cli import dump
from pmp_ds.commands.report import main
from pmp_ds.config import Config, DataConfig, MaskConfig, RunConfig, TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.log.writer import MetricsLog
from pmp_ds.run_dir import RunDir, write_json, write_text
from pmp_ds.state.run_record import DataFacts
from pmp_ds.study.collect import collect, pretrain_result

DATA = DataFacts(
    dataset_id="d" * 16,
    vocab_size=300,
    eos_id=2,
    block_size=8,
    unigram_cross_entropy=5.0,
    documents=3,
    tokens=800,
    sources=("text",),
)


def finished(root: Path, steps: int = 4, done: int = 4) -> RunDir:
    """Return a run folder as pretrain.py and export.py leave it, after ``done`` of ``steps``
    updates."""
    run = RunDir(root)
    run.create()
    config = Config(
        run=RunConfig(name=root.name),
        data=DataConfig(store="store", seed=7),
        mask=MaskConfig(density=0.6, score="ema"),
        train=TrainConfig(steps=steps, global_batch_size=2, micro_batch_size=2, warmup_steps=0),
    )
    write_text(run.config, dump(config))
    write_json(run.data, asdict(DATA))
    log = MetricsLog(run, enabled=True)
    for step, iou in enumerate((0.8, 0.9), start=2):
        log.write("discover", step, loss=6.0, iou=iou)
    log.write("train", 0, val_loss=6.0)
    for step in range(1, done + 1):
        validation = {} if step % 2 else {"val_loss": 6.0 - step / 4}
        log.write("train", step, loss=5.0, **validation)
    log.close()
    run.release.mkdir()
    (run.release / "config.json").write_text("{}")
    (run.release / "model.safetensors").write_bytes(root.name.encode())
    return run


def test_record(tmp_path: Path):
    result = pretrain_result(finished(tmp_path / "run"), "pmp")
    assert (result.kind, result.arm) == ("pretrain", "pmp")
    assert {
        "density": 0.6,
        "source": "earlybird",
        "score": "ema",
        "steps": 4,
        "tokens": 64,
        "seed": 7,
        "data": "d" * 16,
    }.items() <= result.settings.items()
    assert result.values == {
        "val_loss": 5.0,
        "curve": [[0, 6.0], [32, 5.5], [64, 5.0]],
        "iou": [0.8, 0.9],
    }


def test_twice_is_once(tmp_path: Path):
    runs = [(arm, finished(tmp_path / arm).root) for arm in ("base", "pmp")]
    runs.append(("pmp", finished(tmp_path / "pmp-2").root))
    where = tmp_path / "results.jsonl"
    for _ in range(2):
        collect(runs, where)
    assert len(where.read_text().splitlines()) == 3
    assert [result.arm for result in results.read(where)] == ["base", "pmp", "pmp"]


def test_report_collects(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    finished(tmp_path / "a")
    main(["--study", str(tmp_path), "--collect", f"base={tmp_path / 'a'}"])
    assert "No verdict" in capsys.readouterr().out
    assert (tmp_path / "report" / "figures" / "pretraining.png").exists()


def test_bad_input(tmp_path: Path):
    run = finished(tmp_path / "half", steps=8)
    with pytest.raises(UserError, match="has done 4 of 8 updates"):
        pretrain_result(run, "pmp")
    run = finished(tmp_path / "unexported")
    for path in run.release.iterdir():
        path.unlink()
    run.release.rmdir()
    with pytest.raises(UserError, match=r"has no release: pmp-ds export"):
        pretrain_result(run, "pmp")
    with pytest.raises(UserError, match="nothing is not a run"):
        pretrain_result(RunDir(tmp_path / "nothing"), "pmp")
    with pytest.raises(UserError, match="write ARM=RUN"):
        main(["--study", str(tmp_path), "--collect", "=runs"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name the folder"):
        main(["--study", str(tmp_path / "file")])
