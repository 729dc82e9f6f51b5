"""Pack units in several processes. The store is the same for any number of them.

Processes are spawned, never forked: the tokenizer libraries have threads. A worker whose parent is
gone ends itself, so a killed run leaves nobody writing.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for

from pmp_ds.data.corpus import Unfinished, Unit
from pmp_ds.data.encoder import Encoder
from pmp_ds.data.units import PackJob, UnitResult, pack_unit

_worker: tuple[PackJob, Encoder] | None = None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack_units(
    job: PackJob,
    units: Iterable[Unit],
    workers: int,
    on_done: Callable[[Unit, UnitResult], None],
    on_bytes: Callable[[int], None],
) -> None:
    """Pack every unit and call ``on_done`` as each is finished, in any order.

    One worker means this process, where ``on_bytes`` hears of bytes as they are read; otherwise
    when a unit is finished. Every process holds one unit at a time. Raises what a unit raised,
    ``Unfinished`` when a process died.
    """
    if workers == 1:
        encoder = Encoder(job.encoder)
        for unit in units:
            on_done(unit, pack_unit(job, encoder, unit, on_bytes))
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,))
    pending: dict[Future[UnitResult], Unit] = {}

    def collect() -> None:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            unit = pending.pop(future)
            on_done(unit, future.result())
            on_bytes(unit.num_bytes)

    try:
        for unit in units:
            if len(pending) > workers:
                collect()
            pending[pool.submit(_pack, unit)] = unit
        while pending:
            collect()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # their units are repeated
        if isinstance(error, BrokenProcessPool):
            raise Unfinished(
                f"one of {workers} worker processes died, often for want of memory: run the same "
                "command again, with fewer workers; finished parts are kept"
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: PackJob) -> None:
    global _worker
    with contextlib.suppress(ValueError):  # no main thread: somebody embeds us
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker per core already
    _worker = job, Encoder(job.encoder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _pack(unit: Unit) -> UnitResult:
    assert _worker is not None
    return pack_unit(*_worker, unit)
