"""How a run is led, and what becomes of faults: `run` and `guard`."""

import math
from dataclasses import dataclass
from typing import Literal

from pmp_ds.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how often it reports. May change between restarts of a run."""

    name: str = "pmp"
    """Name of the run: its folder under `run.root`."""

    root: str = "runs"
    """Folder that holds the runs."""

    log_every: int = 1
    """Updates between two lines of metrics.jsonl."""

    val_every: int = 100
    """Updates between two validations; the first and the last update always validate."""

    val_blocks: int = 256
    """Validation blocks read at each validation, the same ones every time."""

    checkpoint_every: int = 500
    """Updates between two checkpoints; the last update always writes one."""

    keep_last: int = 2
    """Newest checkpoints kept."""

    keep_every: int = 0
    """Keep also every checkpoint whose update is a multiple of this; 0 keeps none of them."""

    async_save: bool = True
    """Write checkpoints in the background; training waits only until their content is copied to
    CPU memory (on rank 0 that is the whole model). Without it, until the files are safe."""

    max_time: float | str | None = None
    """Time that this job may take, as HH:MM:SS or seconds: it saves and stops in time, with exit
    code 75. Unset means no limit."""

    prometheus: str | None = None
    """Folder of node_exporter's textfile collector: the numbers of the run go to a file there that
    is named after it. Unset: to metrics.prom in the run's folder."""

    wandb: str | None = None
    """Project of Weights & Biases that receives the records too; needs `pip install wandb`."""

    restarts: int = 0
    """How often each rank restarts after a fault (not after a mistake in the settings or when it
    was asked to stop), from the last checkpoint."""

    def __post_init__(self) -> None:
        require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"run.name={self.name!r} is not a folder name; set run.root for the folder above it",
        )
        for name in ("log_every", "val_every", "val_blocks", "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name}={value} must be at least 1")
        for name in ("keep_every", "restarts"):
            value = getattr(self, name)
            require(value >= 0, f"run.{name}={value} must not be negative")
        _ = self.max_seconds

    @property
    def max_seconds(self) -> float:
        """``max_time`` in seconds, infinite when unset; raises UserError."""
        if self.max_time is None:
            return math.inf
        try:
            parts = [float(part) for part in str(self.max_time).split(":")]
            seconds = sum(part * 60.0**i for i, part in enumerate(reversed(parts)))
            if len(parts) > 3 or not 0.0 < seconds < math.inf or min(parts) < 0.0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"run.max_time={self.max_time!r} is no time: write HH:MM:SS, MM:SS or seconds"
            ) from None
        return seconds


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do when something goes wrong. May change between restarts of a run."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the batch, for which every update waits
    until its loss is known."""

    spike: Literal["ignore", "warn", "skip", "stop"] = "warn"
    """A loss far above its running mean: say so, skip the batch, or save and stop before it. With
    the last two, every update waits until its loss is known."""

    spike_sigmas: float = 8.0
    """How many running standard deviations above the running mean are a spike."""

    drift: Literal["ignore", "stop"] = "stop"
    """Frozen elements that changed, or a mask that changed in memory: stop without saving."""

    drift_every: int = 100
    """Updates between two looks at a sample of the frozen elements."""

    straggler: Literal["ignore", "warn", "stop"] = "warn"
    """A rank that takes much longer than the others: name it, or save and stop as well."""

    straggler_factor: float = 2.0
    """A straggler takes this many times as long as the median of the other ranks."""

    straggler_seconds: float = 0.5
    """And at least so many seconds longer for an update: what is less is noise."""

    disk: Literal["warn", "stop"] = "warn"
    """A checkpoint for which the disk has no room: go on without it, or stop. The last one always
    stops."""

    hang_seconds: float = 1800.0
    """Without progress for so long, every rank writes its stacks to `stacks/` and the run ends;
    0 waits for ever."""

    lost_seconds: float = 60.0
    """A rank that gives no sign of life for so long, because its host or network is gone, ends the
    run, which names it; 0 waits for as long as the system's network does."""

    on_fault: str | None = None
    """Shell command that runs when the run ends other than done: by a fault, a stop of the guard or
    a signal. It learns why from PMP_DS_RUN, PMP_DS_CODE, PMP_DS_REASON, PMP_DS_RANK and
    PMP_DS_HOST, and may take 30 s."""

    def __post_init__(self) -> None:
        require(self.spike_sigmas > 0, f"guard.spike_sigmas={self.spike_sigmas} must be positive")
        require(self.drift_every >= 1, f"guard.drift_every={self.drift_every} must be at least 1")
        require(
            self.straggler_factor > 1,
            f"guard.straggler_factor={self.straggler_factor} must be above 1",
        )
        require(
            self.lost_seconds == 0 or self.lost_seconds >= 5,
            f"guard.lost_seconds={self.lost_seconds} must be 0 or at least 5: signs of life come "
            "every second, and a busy machine may be late",
        )
        for name in ("hang_seconds", "straggler_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"guard.{name}={value} must not be negative")
