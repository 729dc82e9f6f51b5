"""Weights & Biases, fed with the records of metrics.jsonl: `run.wandb`.

W&B is not a dependency. It is told the records and the settings in ``PUBLIC``, and nothing about
this machine: no command line, host, file, console output or installed packages. Each start is a run
of its own in a group that has the run's name, so that no start overwrites another.
"""

import importlib.util
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pmp_ds.config import Config, RunConfig
from pmp_ds.errors import UserError, require
from pmp_ds.log.board import tag, values_of
from pmp_ds.log.records import Start
from pmp_ds.run_dir import RunDir

FINISH_SECONDS = 60.0
"""Seconds for what is not uploaded yet when the run ends."""

PUBLIC = {
    "run": ("name",),
    "train": (
        "optimizer",
        "moments",
        "steps",
        "global_batch_size",
        "precision",
        "lr",
        "schedule",
        "warmup_steps",
        "decay_steps",
        "weight_decay",
        "clip_norm",
    ),
}
"""The settings that are sent: nothing of `init`, `mask` and `guard`, and no path."""


def check_installed(config: RunConfig) -> None:
    """Raise UserError when ``run.wandb`` is set and the package is missing."""
    require(
        config.wandb is None or importlib.util.find_spec("wandb") is not None,
        f"run.wandb={config.wandb} needs the package wandb: pip install wandb, or leave it out",
    )


def public(config: Config) -> dict[str, Any]:
    """Return the settings in ``PUBLIC`` that the configuration has."""
    settings = asdict(config)
    return {
        f"{section}.{name}": settings[section][name]
        for section, names in PUBLIC.items()
        for name in names
        if name in settings[section]
    }


class Wandb:
    """A sink for one W&B run. Raises UserError when W&B does not start."""

    def __init__(self, run: RunDir, config: Config, starts: Sequence[Start]) -> None:
        import wandb

        self._failed = False
        number = starts[-1].number if starts else 1
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            program="",
            program_relpath="",
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=config.run.wandb,
                name=f"{config.run.name}-{number}",
                group=config.run.name,
                dir=str(run.root),
                config=public(config),
                settings=settings,
            )
            for group in ("train", "eval", "system"):
                self._run.define_metric(f"{group}/*", step_metric="update")
            for group in ("discovery", "system/discovery"):
                self._run.define_metric(f"{group}/*", step_metric="update_of_discovery")
        except Exception as error:  # noqa: BLE001 - of the package, in all its versions
            raise UserError(
                f"run.wandb={config.run.wandb}: W&B does not start: {error}. Log in with `wandb "
                "login`, set WANDB_MODE=offline, or leave run.wandb out"
            ) from None

    def record(self, record: dict[str, Any]) -> None:
        phase = record["phase"]
        values = {tag(phase, name): value for name, value in values_of(record).items()}
        values["update" if phase == "train" else "update_of_discovery"] = record["step"]
        try:
            self._run.log(values)
        except Exception as error:  # noqa: BLE001 - a service must not end the run
            self._warn(f"W&B does not take records: {error}")

    def close(self, code: int | None) -> None:
        def finish() -> None:
            try:
                self._run.finish(exit_code=70 if code is None else code)
            except Exception as error:  # noqa: BLE001
                self._warn(f"W&B did not finish: {error}")

        thread = threading.Thread(target=finish, name="wandb", daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            self._warn(f"W&B did not finish within {FINISH_SECONDS:g} s; `wandb sync` uploads it")

    def _warn(self, text: str) -> None:
        if not self._failed:
            print(f"warning: run.wandb: {text}. Training continues", file=sys.stderr, flush=True)
        self._failed = True
