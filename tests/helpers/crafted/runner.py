"""Open crafted inputs one after the other in a worker that may hang, crash or eat memory.

    for outcome in outcomes(inputs): ...

The worker calls the code in process. It is killed when an input takes more than SECONDS, and begun
again with the next one; its address space is limited, so that no input can harm the machine.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 60  # of a busy machine; the table says the longest
MEGABYTES = 500
_LIMIT = 3 << 30  # of address space beyond what the worker has at its start


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    kind: str
    name: str
    what: str
    """`works`, `refused`, `traceback`, `hang`, `crash` or `unprintable`."""
    said: str
    """The message, or the end of a traceback."""
    ran: bool
    """Whether code of the input was run."""
    megabytes: float
    """Peak of resident memory above what it was before."""
    seconds: float

    @property
    def good(self) -> bool:
        fine = self.what in ("works", "refused") and not self.ran
        return fine and self.megabytes < MEGABYTES and self.seconds < SECONDS


def outcomes(inputs: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
    """The outcome of each of ``inputs``, (kind, name), in order."""
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
                    yield (
                        here.recv()
                        if answered
                        else Outcome(kind, name, "hang", "", False, 0.0, SECONDS)
                    )
                except EOFError:
                    worker.join()
                    yield Outcome(kind, name, "crash", f"{worker.exitcode}", False, 0.0, 0.0)
                    break
                if not answered:
                    break
        finally:
            worker.kill()
            worker.join()
            here.close()


class _TooLong(BaseException):
    """Of no kind that the code under test catches."""


def _work(pipe: Connection, wanted: Sequence[tuple[str, str]]) -> None:
    from tests.helpers.crafted.corpus import find

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.environ.get("CRAFTED_STDERR", os.devnull), os.O_WRONLY | os.O_CREAT), 2)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inputs = find(wanted)
    with tempfile.TemporaryDirectory(prefix="crafted-") as place:
        templates = Path(place, "good")
        for kind in dict.fromkeys(kind for kind, _ in wanted):
            _template(templates, kind)
        os.chdir(place)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _LIMIT, used + _LIMIT))
        pipe.send("ready")
        for one in inputs:
            pipe.send(_open(Path(place), templates, one))


def _template(templates: Path, kind: str) -> None:
    from tests.helpers.crafted.kinds import KINDS

    folder = templates / kind
    folder.mkdir(parents=True)
    KINDS[kind].make(folder)
    shutil.copytree(folder, folder.with_name("once"))
    KINDS[kind].use(folder.with_name("once"))  # imports, and proof that it is good
    shutil.rmtree(folder.with_name("once"))


def _open(place: Path, templates: Path, one: "object") -> Outcome:
    import time

    from pmp_ds.errors import UserError
    from tests.helpers.crafted.kinds import KINDS
    from tests.helpers.crafted.variants import Input

    assert isinstance(one, Input)
    folder, canary = place / "work" / "x", place / "ran"
    shutil.copytree(templates / one.kind, folder, symlinks=True)
    what, said = "works", ""
    before = _megabytes("VmRSS")
    clock = time.perf_counter()
    try:
        one.craft(folder)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        KINDS[one.kind].use(folder)
    except UserError as error:
        said = _printed(error)
        what = "refused" if said.isprintable() and len(said) < 2000 else "unprintable"
    except _TooLong:
        what = "hang"
    except BaseException:  # noqa: BLE001 - whatever it is, it is what we look for
        what, said = "traceback", "".join(traceback.format_exc().splitlines(True)[-7:])
    finally:
        signal.alarm(0)
    seconds = time.perf_counter() - clock
    ran = canary.exists() or (folder / "ran").exists()
    canary.unlink(missing_ok=True)
    shutil.rmtree(place / "work")
    return Outcome(
        one.kind, one.name, what, said, ran, max(0.0, _megabytes("VmHWM") - before), seconds
    )


def _printed(error: Exception) -> str:
    """As ``exit_code`` prints it."""
    from pmp_ds import errors

    shown = getattr(errors, "shown", str)
    return f"error: {shown(str(error))}"


def _too_long(*_: object) -> None:
    raise _TooLong


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
