"""Kill a run repeatedly, at random moments of every phase; it must end with the same bits.

    python -m tests.helpers.torture --kills 50 --seed 7      # make torture; its own folder in /tmp

Each attempt is the real command, started again after the last kill. The moments are drawn from the
seed, in the order in which a run reaches them: update k of discovery, the writing of a checkpoint,
and so on, each with a random delay. After each kill no process of that attempt may survive. In the
end checkpoint, ticket, release and metrics equal those of an undisturbed run, and no temporary file
is left.
"""

import argparse
import contextlib
import itertools
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pmp_ds.log import read_metrics
from pmp_ds.run_dir import RunDir
from tests.helpers.commands import DS_CONFIGS, Done, kill, ok, start
from tests.helpers.lives import comparable
from tests.helpers.workdir import STEPS, furnish

Phase = Literal[
    "start", "discovery", "saving in discovery", "training", "saving in training", "export"
]
Victim = Literal["all", "rank 0", "rank 1", "launcher"]
VICTIMS: tuple[Victim, ...] = ("all", "rank 0", "rank 1", "launcher")
MARK = "PMP_TORTURE"  # in the environment of every process of a life
ROUND: dict[Phase, int] = {
    "start": 3,
    "discovery": 5,
    "saving in discovery": 5,
    "training": 6,
    "saving in training": 6,
    "export": 3,
}
"""Number of kills of one run. The order is that of PHASES, with kills during saves mixed in."""


@dataclass(frozen=True)
class Blow:
    """Kill ``victim`` ``delay`` seconds after update ``step`` of the phase was recorded, or after
    the writing of its checkpoint began."""

    phase: Phase
    victim: Victim
    step: int
    delay: float


@dataclass(frozen=True)
class Place:
    """Describe the place of a tortured run: ``work`` has store and recipe (helpers/workdir.py)."""

    work: Path
    run: RunDir
    settings: tuple[str, ...] = ()

    @property
    def scratch(self) -> Path:
        """Return the folder that the commands use as /tmp."""
        return self.run.root.parent / "tmp"

    def environment(self) -> dict[str, str]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        return {MARK: str(self.run.root), "TMPDIR": str(self.scratch)}

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        return (
            "--config",
            "tiny.yaml",
            "--run.root",
            self.run.root.parent,
            *self.settings,
            "--deepspeed-config",
            DS_CONFIGS / "zero1.json",
        )

    def pretrain(self, *more: str) -> "subprocess.Popen[str]":
        return start(
            "pretrain.py", *self.arguments, *more, cwd=self.work, ranks=2, env=self.environment()
        )

    def export(self) -> "subprocess.Popen[str]":
        return start("export.py", "--run", self.run.root, cwd=self.work, env=self.environment())

    def processes(self) -> list[psutil.Process]:
        """Return all processes of this place: the launcher and its children."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.run.root):
                    found.append(process)
            except psutil.Error:  # gone, or a zombie
                continue
        return found

    def last_step(self, phase: str) -> int:
        records = read_metrics(self.run.metrics)
        return max((r["step"] for r in records if r["phase"] == phase and "loss" in r), default=0)

    def being_written(self, kind: str) -> int:
        """Return the update whose checkpoint is being written, 0 for none."""
        names = [path.name for path in self.run.checkpoints.glob(f"{kind}-*.incomplete")]
        return max((int(name.split("-")[1].split(".")[0]) for name in names), default=0)


def finish(process: "subprocess.Popen[str]", timeout: float = 300) -> Done:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return Done(process.args, process.returncode, out, err)


def plan(counts: dict[Phase, int], discovery: int, chance: random.Random) -> list[Blow]:
    """Return the kills of one run in order. Those of a phase are spread over its updates, so that
    the run advances however often it is killed."""
    victims = itertools.cycle(chance.sample(VICTIMS, len(VICTIMS)))
    startup = [Blow("start", "all", 0, chance.random()) for _ in range(counts.get("start", 0))]
    blows = []
    phases: tuple[tuple[Phase, Phase, int], ...] = (
        ("discovery", "saving in discovery", discovery),
        ("training", "saving in training", STEPS),
    )
    for plain, saving, steps in phases:
        kinds = [plain] * counts.get(plain, 0) + [saving] * counts.get(saving, 0)
        chance.shuffle(kinds)
        for i, kind in enumerate(kinds):
            # Leave out the last two updates: they may end before the kill.
            step = 1 + int((i + chance.random()) / len(kinds) * (steps - 3))
            delay = chance.uniform(0, 0.08 if kind == saving else 0.05)
            blows.append(Blow(kind, next(victims), step, delay))
    late = [0.7 * chance.random() for _ in range(counts.get("export", 0))]
    exports = [Blow("export", "all", 0, share) for share in late]
    # Disturb one start in the middle of the run, where there is something to lose.
    for blow in startup:
        blows.insert(chance.randrange(len(blows) + 1), blow)
    return blows + exports


def strike(place: Place, blow: Blow, durations: dict[str, float], *more: str) -> Phase | None:
    """Run the command once with a kill. Return the phase in which it was killed, None if it ended
    first."""
    moment = Moment(place, blow)
    process = place.export() if blow.phase == "export" else place.pretrain(*more)
    began = time.monotonic()
    delay = blow.delay * durations.get(blow.phase, 1.0)
    try:
        while not moment.has_come():
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()
                break
            assert time.monotonic() - began < 200, "the moment did not come"
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        _hit(place, process, blow.victim)
        done = finish(process, 120)
        _none_runs_on(place)
    finally:
        kill(process)
    if done.returncode == 0:  # it ended first
        shutil.rmtree(place.run.release, ignore_errors=True)
        return None
    if blow.victim.startswith("rank") and "fault: rank" not in done.stderr:
        raise AssertionError(f"{blow}: no reason on screen:\n{done.stdout}\n{done.stderr}")
    if blow.phase == "start":
        return "start"  # files left by the previous start are still there
    if place.being_written("discover"):
        return "saving in discovery"
    if place.being_written("update"):
        return "saving in training"
    # A checkpoint that was complete before the kill does not count as a kill during a save.
    return {"saving in discovery": "discovery", "saving in training": "training"}.get(
        blow.phase, blow.phase
    )  # type: ignore[return-value]  # all are words of the type


class Moment:
    """Detect the moment of a kill from outside. Records of earlier starts do not count: a start
    that gets so far is recorded in metrics.jsonl and then writes config.yaml."""

    def __init__(self, place: Place, blow: Blow) -> None:
        """Note the state before the command starts."""
        self._place, self._blow = place, blow
        self._kind = "discover" if "discovery" in blow.phase else "train"
        self._old = self._start()
        self._first: int | None = None

    def has_come(self) -> bool:
        place, blow = self._place, self._blow
        if blow.phase in ("start", "export"):
            return True
        if self._start() == self._old:
            return False
        if blow.phase.startswith("saving"):
            name = {"discover": "discover", "train": "update"}[self._kind]
            come = place.being_written(name) >= blow.step
        else:
            last = place.last_step(self._kind)
            self._first = last if self._first is None else self._first
            come = last >= max(blow.step, self._first + 1)
        return come or (self._kind == "discover" and place.last_step("train") > 0)

    def _start(self) -> tuple[int, int]:
        """Return which start of the run wrote its config.yaml."""
        config = self._place.run.config
        found = config.stat() if config.exists() else None
        return (found.st_ino, found.st_mtime_ns) if found else (0, 0)


def _hit(place: Place, process: "subprocess.Popen[str]", victim: Victim) -> None:
    if victim == "all":
        kill(process)
    elif victim == "launcher":
        process.kill()
    else:
        rank = victim.split()[1]
        for found in place.processes():
            try:
                if found.environ().get("RANK") == rank:
                    found.kill()
            except psutil.NoSuchProcess:
                continue


def _none_runs_on(place: Place, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := place.processes():
        assert time.monotonic() < deadline, f"still running: {[p.cmdline() for p in left]}"
        time.sleep(0.05)


def torture(
    calm: RunDir, place: Place, blows: Sequence[Blow], durations: dict[str, float]
) -> Iterator[tuple[Blow, Phase | None]]:
    """Kill the run at ``place`` at each of ``blows``, let it end, and compare it with ``calm``."""
    place.run.create()
    shutil.copy(calm.init / "key", place.run.init / "key")
    exporting = False
    for number, blow in enumerate(blows):
        if blow.phase == "export" and not exporting:
            ok(finish(place.pretrain()))
            exporting = True
        how = ("--run.async_save", "true" if number % 2 else "false")
        yield blow, strike(place, blow, durations, *how)
    if not exporting:
        ok(finish(place.pretrain()))
    ok(finish(place.export()))
    _none_runs_on(place, 10)
    same_outcome(calm, place.run)
    assert_nothing_left(place)


def same_outcome(calm: RunDir, other: RunDir) -> None:
    """Compare byte for byte: digest of the initial weights, ticket, last checkpoint, release; and
    the metrics."""
    last = f"private/checkpoints/update-{STEPS:08d}"
    for folder in ("private/init", "private/ticket", last, "release"):
        names = [_files(run.root / folder) for run in (calm, other)]
        assert names[0] == names[1] != [], folder
        for name in names[0]:
            one, two = ((run.root / folder / name).read_bytes() for run in (calm, other))
            if name in ("README.md", "SHA256SUMS"):  # the card states the day
                day = re.compile(rb"\d{4}-\d\d-\d\d|.*README.md")
                one, two = day.sub(b"", one), day.sub(b"", two)
            assert one == two, f"{folder}/{name}"
    assert comparable(calm.metrics) == comparable(other.metrics)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_nothing_left(place: Place) -> None:
    """Check that no temporary file or folder is left, in the run or where temporary files go."""
    left = [p for p in place.run.root.rglob("*") if re.search(r"incomplete|tmp|^export-", p.name)]
    assert left == []
    assert list(place.scratch.iterdir()) == []
    names = {path.name for path in place.run.checkpoints.iterdir()}
    assert {"latest", f"update-{STEPS:08d}"} <= names
    assert len(names) <= 3, names  # run.keep_last


def undisturbed(place: Place) -> dict[str, float]:
    """Do the same run without a kill. Return the seconds of start and export."""
    clock = time.monotonic()
    process = place.pretrain()
    while process.poll() is None and not place.last_step("discover"):
        time.sleep(0.01)
    seconds = {"start": time.monotonic() - clock}
    ok(finish(process))
    clock = time.monotonic()
    ok(finish(place.export()))
    return seconds | {"export": time.monotonic() - clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.randrange(1 << 30) if args.seed is None else args.seed
    chance, began, killed = random.Random(seed), time.monotonic(), Counter[tuple[str, str]]()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        work = Path(folder)
        furnish(work)
        settings = (
            "--run.checkpoint_every",
            "2",
            "--mask.iou_threshold",
            "1.0",
            "--mask.on_unstable",
            "last",
        )
        calm = Place(work, RunDir(work / "calm" / "main"), settings)
        durations = undisturbed(calm)
        for number in itertools.count(1):
            place = Place(work, RunDir(work / f"killed{number}" / "main"), settings)
            for blow, phase in torture(calm.run, place, plan(ROUND, 30, chance), durations):
                killed[phase or "missed", blow.victim] += phase is not None
                print(
                    f"{killed.total():4} {time.monotonic() - began:5.0f} s  {phase}: {blow}",
                    flush=True,
                )
            print(f"run {number}: the same bits after {killed.total()} kills", flush=True)
            if killed.total() >= args.kills:
                break
    _summary(killed, time.monotonic() - began)


def _summary(killed: Counter[tuple[str, str]], seconds: float) -> None:
    print(f"\n{'SIGKILL for':>20}" + "".join(f"{victim:>10}" for victim in VICTIMS))
    for phase in ROUND:
        print(f"{phase:>20}" + "".join(f"{killed[phase, victim]:10}" for victim in VICTIMS))
    print(f"{killed.total()} kills in {seconds / 60:.1f} minutes; bitwise the undisturbed run")


if __name__ == "__main__":
    main()
