"""A finished pretraining run as a line of results.jsonl."""

from collections.abc import Iterable
from pathlib import Path

from pmp_ds import results
from pmp_ds.errors import UserError, quoted
from pmp_ds.log import read_metrics
from pmp_ds.results import Result, model_digest
from pmp_ds.run_dir import RunDir
from pmp_ds.state.run_record import load_config, read_data


def pretrain_result(run: RunDir, arm: str) -> Result:
    """Return losses and IoU trace of ``run``; the line holds nothing of a single tensor.

    Raises UserError when ``run`` is no run, is not finished, never validated or has no release,
    whose weights name the model.
    """
    config, data = load_config(run), read_data(run)
    records = read_metrics(run.metrics)
    trained = [record for record in records if record["phase"] == "train"]
    per_update = config.train.global_batch_size * data.block_size
    curve = [[r["step"] * per_update, float(r["val_loss"])] for r in trained if "val_loss" in r]
    last = max((record["step"] for record in trained), default=0)
    if last < config.train.steps or not curve:
        raise UserError(
            f"{run.root} has done {last} of {config.train.steps} updates: the same `pretrain` "
            "command resumes"
        )
    if not run.release.is_dir():
        raise UserError(f"{run.root} has no release: pmp-ds export --run {quoted(run.root)}")
    found = config.mask.source == "earlybird"
    return Result(
        kind="pretrain",
        arm=arm,
        model=str(run.release),
        model_digest=model_digest(run.release),
        settings={
            "source": config.mask.source,
            "density": 1.0 if config.mask.source == "none" else config.mask.density,
            "score": config.mask.score if found else None,
            "quota": config.mask.quota,
            "random_fraction": config.mask.random_fraction,
            "steps": config.train.steps,
            "tokens": config.train.steps * per_update,
            "lr": config.train.lr,
            "seed": config.data.seed,
            "data": data.dataset_id,
        },
        values={
            "val_loss": curve[-1][1],
            "curve": curve,
            "iou": [r["iou"] for r in records if r["phase"] == "discover" and "iou" in r],
        },
        seconds=0.0,
        hardware=results.hardware(),
    )


def collect(runs: Iterable[tuple[str, Path]], where: Path) -> list[Result]:
    """Append a line for each (arm, run); what stands in the file already is not repeated. Several
    runs of an arm are its pretraining seeds."""
    found = [pretrain_result(RunDir(path), arm) for arm, path in runs]
    known = {result.key: result.arm for result in results.read(where)}
    for result in found:
        if known.get(result.key) != result.arm:
            results.append(where, result)
    return found
