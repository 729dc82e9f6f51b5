"""Pack several units at a time. The store is the same for any number of workers.

Up to two workers are threads of this process: reading, tokenizing and hashing release the
interpreter lock, while a process costs half a second and its own copy of everything. More workers
are processes, spawned and never forked, because the tokenizer libraries have threads. A worker
process whose parent is gone ends itself, so a killed run leaves no writer behind.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait as wait_for

from pmp_ds.prepare.corpus import Unfinished, Unit
from pmp_ds.prepare.units import PackJob, UnitResult, pack_unit

MOST_THREADS = 2

Submit = Callable[[Unit], Future[UnitResult]]

_worker: PackJob | None = None


class _StoppedError(Exception):
    """Another unit failed, or the user stopped the run."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pack_units(
    job: PackJob,
    units: Iterable[Unit],
    workers: int,
    on_done: Callable[[Unit, UnitResult], None],
    on_bytes: Callable[[int], None],
) -> None:
    """Pack every unit and call ``on_done`` in this process as each is finished, in any order.

    ``on_bytes`` is called as threads read bytes, or when a process has finished a unit. Every
    worker processes one unit at a time. Raises a unit's error, or ``Unfinished`` when a process
    died.
    """
    if workers <= MOST_THREADS:
        with _threads(job, workers, on_bytes) as submit:
            _pack_all(submit, units, workers, on_done)
        return

    def on_finished(unit: Unit, result: UnitResult) -> None:
        on_done(unit, result)
        on_bytes(unit.num_bytes)

    with _processes(job, workers) as submit:
        _pack_all(submit, units, workers, on_finished)


def _pack_all(
    submit: Submit,
    units: Iterable[Unit],
    workers: int,
    on_done: Callable[[Unit, UnitResult], None],
) -> None:
    pending: dict[Future[UnitResult], Unit] = {}

    def collect() -> None:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            on_done(pending.pop(future), future.result())

    broken_off = None
    try:
        for unit in units:
            if len(pending) > workers:
                collect()
            pending[submit(unit)] = unit
    except Unfinished as error:  # a stream broke off: pack the part that arrived
        broken_off = error
    while pending:
        collect()
    if broken_off is not None:
        raise broken_off


@contextlib.contextmanager
def _threads(job: PackJob, workers: int, on_bytes: Callable[[int], None]) -> Iterator[Submit]:
    """Provide threads; on exit, those still packing stop at their next batch."""
    free: queue.SimpleQueue[PackJob] = queue.SimpleQueue()
    for i in range(workers):
        free.put(replace(job, encoder=job.encoder.twin()) if i else job)
    stopped, one_at_a_time = threading.Event(), threading.Lock()

    def report(num_bytes: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        with one_at_a_time:
            on_bytes(num_bytes)

    def pack(unit: Unit) -> UnitResult:
        mine = free.get()
        try:
            return pack_unit(mine, unit, report)
        finally:
            free.put(mine)

    pool = ThreadPoolExecutor(workers)
    try:
        yield lambda unit: pool.submit(pack, unit)
    finally:
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _processes(job: PackJob, workers: int) -> Iterator[Submit]:
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,))
    try:
        yield lambda unit: pool.submit(_pack, unit)
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # its unit will be repeated
        if isinstance(error, BrokenProcessPool):
            raise Unfinished(
                f"one of {workers} worker processes died, often for lack of memory: run the same "
                "command again, with fewer workers; finished parts are kept"
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: PackJob) -> None:
    global _worker
    with contextlib.suppress(ValueError):  # not in a main thread: embedded
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker per core already
    _worker = job


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _pack(unit: Unit) -> UnitResult:
    assert _worker is not None
    return pack_unit(_worker, unit)
