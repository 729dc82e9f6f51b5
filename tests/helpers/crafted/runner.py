"""Open crafted inputs one after the other in a worker that may hang, crash or eat memory.

    for outcome in outcomes(inputs): ...

The worker calls the code in process. An input hangs if it takes CPU_SECONDS of the worker's own
processor time, so that a busy machine does not matter, or SECONDS of wall time. A worker that does
not notice even that is killed and restarted with the next input. Its address space is limited, so
that no input can harm the machine.

Memory is the worker's peak during an input (VmHWM, reset through clear_refs), above its memory
after its imports and after opening a valid input of each of its kinds.
"""

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa

from pmp_ds.errors import UserError, lines
from tests.helpers.crafted.corpus import find
from tests.helpers.crafted.kinds import KINDS
from tests.helpers.crafted.variants import Input

CPU_SECONDS = 10
SECONDS = 60  # of a busy machine
MEGABYTES = 500
_LIMIT = 3 << 30  # of address space beyond what the worker has at its start
_KEPT = 100  # megabytes: allocators keep what they had, and the next input would pay for it
_LONGEST = 2000  # characters of a message


@dataclass(frozen=True)
class Outcome:
    """Describe the outcome of one input."""

    kind: str
    name: str
    what: str
    """`works`, `refused`, `traceback`, `hang`, `crash` or `unprintable`."""
    said: str
    """The message, or the end of a traceback."""
    ran: bool
    """Whether code of the input was run."""
    megabytes: float
    """Peak of resident memory above the worker's at its start."""
    seconds: float
    """Processor seconds."""

    @property
    def good(self) -> bool:
        fine = self.what in ("works", "refused") and not self.ran
        return fine and self.megabytes < MEGABYTES and self.seconds < CPU_SECONDS


def outcomes(inputs: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
    """Yield the outcome of each of ``inputs``, (kind, name), in order."""
    context = multiprocessing.get_context("spawn")
    left = list(inputs)
    while left:
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, left), daemon=True)
        worker.start()
        there.close()
        try:
            assert here.poll(300), "the worker does not begin"
            assert here.recv() == "ready"
            while left:
                kind, name = left.pop(0)
                try:
                    answered = here.poll(SECONDS + 2)
                    outcome = (
                        here.recv()
                        if answered
                        else Outcome(kind, name, "hang", "", False, 0.0, SECONDS)
                    )
                    yield outcome
                except EOFError:
                    worker.join()
                    yield Outcome(kind, name, "crash", f"{worker.exitcode}", False, 0.0, 0.0)
                    break
                if not answered or outcome.megabytes > _KEPT:
                    break
        finally:
            worker.kill()
            worker.join()
            here.close()


class _TooLong(BaseException):
    """Raise a type that the code under test does not catch."""


def _work(pipe: Connection, wanted: Sequence[tuple[str, str]]) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.environ.get("CRAFTED_STDERR", os.devnull), os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for sign in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(sign, _too_long)
    inputs = find(wanted)
    with tempfile.TemporaryDirectory(prefix="crafted-") as place:
        templates = Path(place, "good")
        for kind in dict.fromkeys(kind for kind, _ in wanted):
            _template(templates, kind)
        os.chdir(place)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _LIMIT, used + _LIMIT))
        before = _resident()
        pipe.send("ready")
        for one in inputs:
            pipe.send(_open(Path(place), templates, one, before))


def _template(templates: Path, kind: str) -> None:
    folder = templates / kind
    folder.mkdir(parents=True)
    KINDS[kind].make(folder)
    shutil.copytree(folder, folder.with_name("once"))
    if (use := KINDS[kind].use) is not None:
        use(folder.with_name("once"))  # imports, and proof that it is good
    shutil.rmtree(folder.with_name("once"))


def _open(place: Path, templates: Path, one: Input, before: float) -> Outcome:
    folder, canary = place / "work" / "x", place / "ran"
    shutil.copytree(templates / one.kind, folder, symlinks=True)
    use = one.use or KINDS[one.kind].use
    assert use is not None
    what, said = "works", ""
    clock = time.process_time()
    try:
        one.craft(folder)
        _resident()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        clock = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(SECONDS)
        use(folder)
    except UserError as error:
        said = f"error: {lines(str(error))}"  # as `exit_code` prints it
        clean = all(line.isprintable() for line in said.splitlines())
        what = "refused" if clean and len(said) < _LONGEST else "unprintable"
    except _TooLong:
        what = "hang"
    except BaseException:  # noqa: BLE001 - whatever it is, it is what we look for
        what, said = "traceback", "".join(traceback.format_exc().splitlines(True)[-7:])
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - clock
    ran = canary.exists() or (folder / "ran").exists()
    canary.unlink(missing_ok=True)
    peak = max(0.0, _megabytes("VmHWM") - before)
    shutil.rmtree(place / "work")
    return Outcome(one.kind, one.name, what, said, ran, peak, seconds)


def _too_long(*_: object) -> None:
    raise _TooLong


def _resident() -> float:
    """Return megabytes in memory, without memory that is free but kept."""
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    return _megabytes("VmRSS")


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
