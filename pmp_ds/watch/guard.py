"""Check every update for faults and react as the settings say (GuardConfig).

An update is judged while the next one is computed, so the host does not wait for the device. Where
the settings keep a bad loss or gradient from being applied (``waits``), the host waits for each
loss. `skip` drops the batch: weights, moments and step counters stay, data and schedule advance.
`stop` on a spike saves the state before it.
"""

import math
import sys
import time

from pmp_ds import dist
from pmp_ds.config import GuardConfig
from pmp_ds.engine.engine import Engine
from pmp_ds.errors import UserError
from pmp_ds.log.writer import MetricsLog
from pmp_ds.optim.drift import DriftProbe
from pmp_ds.watch.stop import StopRequest

_DECAY, _WARM_UP = 0.98, 50  # of the running loss; updates before it is used
_STRAGGLER_UPDATES = 20
_STRAGGLER_PAUSE = 600.0  # seconds between the first two warnings; doubles after each
_INTACT = "the last checkpoint is intact"


class BadUpdateError(UserError):
    """An update that must not be applied; the state before it is good and can be saved."""


class Guard:
    """Checks an armed engine. ``memory`` comes from an earlier guard of this run."""

    def __init__(
        self,
        config: GuardConfig,
        engine: Engine,
        log: MetricsLog,
        stop: StopRequest,
        channel: dist.SideChannel,
        memory: dict[str, float],
    ) -> None:
        self._config, self._engine, self._log = config, engine, log
        self._stop, self._channel = stop, channel
        self._probe = DriftProbe(engine.shards, engine.optimizer)
        self._seconds: list[float] = []
        self._told, self._pause = -math.inf, _STRAGGLER_PAUSE
        self.memory = {"count": 0.0, "mean": 0.0, "var": 0.0, "skipped": 0.0} | memory

    def compare_tickets(self, ticket_id: str | None) -> None:
        """Raise UserError unless all ranks read the same ticket. Collective."""
        ids = self._channel.all_gather(ticket_id)
        other = [rank for rank, found in enumerate(ids) if found != ids[0]]
        if other:
            raise UserError(
                f"rank {', '.join(map(str, other))} read another ticket than rank 0: run.root must "
                "be one folder that all nodes share, with the same files on each"
            )

    @property
    def waits(self) -> bool:
        """Whether ``admits`` must approve an update before it is applied."""
        return self._config.nonfinite == "skip" or self._config.spike in ("skip", "stop")

    def admits(self, step: int, loss: float) -> bool:
        """Return whether to apply update ``step``, given its mean loss over all ranks.

        Called between backward and step, after all earlier updates are judged. Collective. Raises
        BadUpdateError.
        """
        problem, policy, way_out = self._problem(loss)
        if problem is None:
            self._learn(loss)
            return True
        text = f"update {step}: {problem}"
        if policy == "stop":
            raise BadUpdateError(f"{text}. {way_out}")
        if policy == "skip":
            self.memory["skipped"] += 1
            self._log.write("train", step, skipped=self.memory["skipped"])
        _say(f"{text}{'; the batch is skipped' if policy == 'skip' else ''}")
        return policy != "skip"

    def judge(self, step: int, loss: float, norm: float, compute_seconds: float) -> bool:
        """Judge update ``step``, which was applied; return whether all ranks must stop.

        ``loss`` is the mean over all ranks, ``compute_seconds`` this rank's own computing time.
        Collective. Raises UserError when the update spoilt the weights, so all updates are judged
        before the weights are saved.
        """
        if not self.waits:
            problem, policy, way_out = self._problem(loss)
            if policy == "stop":
                raise UserError(f"update {step}: {problem}; {_INTACT}. {way_out}")
            if problem is None:
                self._learn(loss)
            else:
                _say(f"update {step}: {problem}")
        if not math.isfinite(norm) and not self._engine.overflow_is_normal:
            raise UserError(
                f"update {step}: the gradient norm is {norm}; {_INTACT}. {_WAY_OUT_NONFINITE}"
            )
        self._seconds.append(compute_seconds)
        if len(self._seconds) < _STRAGGLER_UPDATES or self._config.straggler == "ignore":
            return False
        stop = self._look_for_straggler(step)
        self._seconds.clear()
        return stop

    def _problem(self, loss: float) -> tuple[str | None, str, str]:
        config = self._config
        if not math.isfinite(loss):
            return f"the loss is {loss}", config.nonfinite, _WAY_OUT_NONFINITE
        if config.nonfinite == "skip" and not self._engine.gradients_are_finite():
            return "a gradient is not finite", config.nonfinite, _WAY_OUT_NONFINITE
        mean, sigma = self.memory["mean"], math.sqrt(self.memory["var"])
        if (
            config.spike != "ignore"
            and self.memory["count"] >= _WARM_UP
            and loss > mean + config.spike_sigmas * sigma
        ):
            problem = (
                f"the loss {loss:.4f} is {(loss - mean) / max(sigma, 1e-12):.1f} running standard "
                f"deviations above its running mean {mean:.4f}"
            )
            return problem, config.spike, _WAY_OUT_SPIKE
        return None, "", ""

    def _learn(self, loss: float) -> None:
        memory = self.memory
        new = 1.0 - _DECAY if memory["count"] >= 1.0 / (1.0 - _DECAY) else 1 / (memory["count"] + 1)
        delta = loss - memory["mean"]
        memory["mean"] += new * delta
        memory["var"] = (1.0 - new) * (memory["var"] + new * delta * delta)
        memory["count"] += 1

    def check_drift(self, step: int) -> None:
        """Raise UserError if frozen elements or the mask changed in memory. Waits for the device.
        Collective."""
        if self._config.drift == "ignore":
            return
        mine = [float(self._probe.changed()), float(not self._probe.mask_is_intact())]
        changed = self._channel.all_gather_numbers(mine)
        bad = changed.sum(dim=1).nonzero().view(-1).tolist()
        if bad:
            what = "the mask" if changed[:, 1].any() else "frozen elements"
            raise UserError(
                f"update {step}: {what} changed in the memory of rank {', '.join(map(str, bad))}; "
                f"{_INTACT}. Run the same command again; if this recurs, suspect that machine"
            )

    def _look_for_straggler(self, step: int) -> bool:
        """Return whether to stop because of a straggler, the same on all ranks."""
        mean = sum(self._seconds) / len(self._seconds)
        seconds = self._channel.all_gather_numbers([mean]).view(-1).tolist()
        found = straggler(seconds, self._config.straggler_factor, self._config.straggler_seconds)
        if found is None:
            return False
        slowest, usual = found
        text = (
            f"rank {slowest} takes {seconds[slowest] / max(usual, 1e-9):.1f} times as long as the "
            f"others ({seconds[slowest]:.3f} s of its own per update, the others {usual:.3f} s)"
        )
        if self._config.straggler == "stop":
            self._stop.ask(text)
            return True
        if time.monotonic() - self._told > self._pause:
            self._pause *= 1 if self._told == -math.inf else 2
            self._told = time.monotonic()
            _say(f"update {step}: {text}")
        return False


def straggler(seconds: list[float], factor: float, floor: float) -> tuple[int, float] | None:
    """Return the slowest rank and the median of the others, given the seconds per update of every
    rank, if it takes ``factor`` times as long as they and ``floor`` seconds longer."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = sorted(value for rank, value in enumerate(seconds) if rank != slowest)
    if not others:
        return None
    usual = others[len(others) // 2]
    slow = seconds[slowest] > factor * usual and seconds[slowest] > usual + floor
    return (slowest, usual) if slow else None


_WAY_OUT_NONFINITE = (
    "Lower train.lr, lengthen train.warmup_steps, or drop such batches with guard.nonfinite=skip"
)
_WAY_OUT_SPIKE = (
    "Inspect the data there, raise guard.spike_sigmas, or drop such batches with guard.spike=skip"
)


def _say(text: str) -> None:
    if dist.rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)
