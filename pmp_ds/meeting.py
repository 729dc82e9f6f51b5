"""How the ranks of one job find each other, before any of them computes.

Rank 0 listens at MASTER_ADDR:MASTER_PORT. Every rank sends its run, its host and any mistake it
found. So a port of another job, a missing rank and a mistake on a single host are each reported in
one line, on rank 0, within seconds. Later, signs of life and last words travel the same way
(lifeline.py).

Anyone who can reach the port can read these messages: they contain no secrets.
"""

import datetime
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from pmp_ds.errors import LostRankError, SharedError, UserError
from pmp_ds.launchers import launch_id

TELL_SECONDS = 30.0
"""Seconds between two lines about missing ranks."""

MISTAKE_SECONDS = 20.0
"""Seconds to wait for missing ranks after another one has found a mistake."""

READ_SECONDS = 5.0
"""Maximum seconds that rank 0 waits until the others have read the verdict."""

_SHOWN = 3  # different mistakes, and missing ranks
_OWN_PORT = (
    "give each job its own port (deepspeed --master_port, torchrun --master-port, or MASTER_PORT)"
)


_NOT_THERE = "check that every rank was started and reaches MASTER_ADDR:MASTER_PORT"


class Meeting:
    """The ranks of this job after they met. All of them share ``store``."""

    def __init__(self, store: Store, rank: int, hosts: Sequence[str]) -> None:
        self.store, self.rank = store, rank
        self.hosts = tuple(hosts)
        """Host of every rank."""

    def name(self, rank: int) -> str:
        """Return a name such as `rank 1 on host h2`."""
        return f"rank {rank} on host {self.hosts[rank]}"

    def another_connection(self) -> Store:
        """Return a connection for another thread: each serves one caller at a time."""
        store: Any = self.store  # torch's types lack `clone`
        clone: Store = store.clone()
        return clone

    def wait(self, key: str) -> None:
        """Wait without a limit until a rank sets ``key``; signals and other threads are served
        meanwhile. Raises DistError when rank 0, which keeps the store, is gone."""
        _poll(lambda: self.store.check([key]))


def meet(run: str | None, mistake: str | None, seconds: float) -> Meeting:
    """Meet the WORLD_SIZE ranks of the job that trains ``run``, as RANK, at
    MASTER_ADDR:MASTER_PORT. A rank without a run fits any job.

    ``mistake`` is the reason why this rank cannot start. Raises SharedError on every rank when any
    has one, UserError when the port is taken or another job's, and LostRankError when ranks are
    missing after ``seconds``: their hosts may come later.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    me = {"host": socket.gethostname(), "mistake": mistake}
    job = {"run": run, "world_size": world, "launch": _launch(world)}
    deadline = time.monotonic() + seconds
    store = _open(rank, place, deadline)
    try:
        if rank == 0:
            store.set("job", json.dumps(job))
            verdict = _judge(store, world, me, place, deadline)
            store.set("verdict", json.dumps(verdict))
            _await_readers(store, sum(host is not None for host in verdict["hosts"]) - 1)
        else:
            _await(store, "job", f"rank 0 at {place}", deadline)
            _compare(json.loads(store.get("job")), job, place)
            if store.add(f"came/{rank}", 1) > 1:
                raise UserError(
                    f"rank {rank} has already come to {place}: the same job runs twice with one "
                    f"port; {_OWN_PORT}"
                )
            store.set(f"rank/{rank}", json.dumps(me))
            _await(store, "verdict", f"the other ranks at {place}", float("inf"))
            verdict = json.loads(store.get("verdict"))
            store.add("read", 1)
    except DistError as error:
        raise LostRankError(f"rank 0 at {place} left before all ranks had come: {error}") from None
    if verdict["mistake"] is not None:
        raise SharedError(verdict["mistake"])
    if verdict["missing"] is not None:
        raise LostRankError(verdict["missing"])
    return Meeting(store, rank, verdict["hosts"])


def in_words(mistakes: Sequence[str | None], names: Sequence[str]) -> str | None:
    """Return one text for the ranks' mistakes, with names unless all have it, or None."""
    found: dict[str, list[str]] = {}
    for mistake, name in zip(mistakes, names, strict=True):
        if mistake is not None:
            found.setdefault(mistake, []).append(name)
    if not found:
        return None
    if len(found) == 1 and None not in mistakes:
        return next(iter(found))
    texts = []
    for mistake, who in list(found.items())[:_SHOWN]:
        more = f" and {len(who) - 1} more" if len(who) > 1 else ""
        texts.append(f"{who[0]}{more}: {mistake}")
    return "\n  ".join(texts)


def _launch(world: int) -> list[Any] | None:
    """Return the start that a job on one machine belongs to."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    found = launch_id() if local == str(world) else None
    return None if found is None else list(found)


def _open(rank: int, place: str, deadline: float) -> Store:
    host, _, port = place.rpartition(":")
    limit = datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))
    # torchrun's agent may listen there instead of rank 0.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = _listen(host, int(port), place).detach() if rank == 0 and not agent else None
    if listener is None:
        _await_listener(host, int(port), deadline)
    store = TCPStore(
        host,
        int(port),
        is_master=listener is not None,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    return PrefixStore(f"pmp-ds/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listen(host: str, port: int, place: str) -> socket.socket:
    """Listen, for this machine alone if no other takes part."""
    alone = host in ("127.0.0.1", "localhost")
    dual = socket.has_dualstack_ipv6() and not alone
    family = socket.AF_INET6 if dual else socket.AF_INET
    address = "127.0.0.1" if alone else ""
    try:
        return socket.create_server(
            (address, port), family=family, dualstack_ipv6=dual, backlog=4096
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {socket.gethostname()} is taken, so the ranks cannot meet at "
                f"{place}: another job may use it; {_OWN_PORT}"
            ) from None
        raise UserError(f"the ranks cannot meet at {place}: {error}; {_OWN_PORT}") from None


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait until a process listens there."""
    reason = ""

    def answers() -> bool:
        nonlocal reason
        try:
            with socket.create_connection((host, port), timeout=5.0):
                return True
        except OSError as error:
            reason = str(error)
            return False

    _poll(answers, deadline, lambda: f"rank 0 at {host}:{port} ({reason})")


def _await(store: Store, key: str, what: str, deadline: float) -> None:
    _poll(lambda: store.check([key]), deadline, lambda: what)


def _poll(
    there: Callable[[], bool],
    deadline: float = float("inf"),
    what: Callable[[], str] | None = None,
) -> None:
    """Wait until ``there``, reporting now and then. Raises LostRankError at ``deadline``."""
    began = told = time.monotonic()
    pause = 0.002
    while not there():
        now = time.monotonic()
        if now > deadline and what is not None:
            raise LostRankError(f"{what()} did not come within {now - began:.0f} s: {_NOT_THERE}")
        if now - told > TELL_SECONDS and what is not None:
            told = now
            print(f"waiting for {what()}, {now - began:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(0.25, 1.5 * pause)


def _compare(theirs: dict[str, Any], ours: dict[str, Any], place: str) -> None:
    differ = [k for k in ours if theirs.get(k) != ours[k] and None not in (theirs.get(k), ours[k])]
    if differ:
        what = [f"{k} {theirs[k]!r} there, {ours[k]!r} here" for k in differ if k != "launch"]
        raise UserError(
            f"another job meets at {place} ({', '.join(what) or 'the same command, started twice'})"
            f"; {_OWN_PORT}"
        )


def _await_readers(store: Store, count: int) -> None:
    """Let the others read the verdict first, because the store ends with rank 0."""
    last = time.monotonic() + READ_SECONDS
    _poll(lambda: store.add("read", 0) >= count or time.monotonic() > last)


def _judge(
    store: Store, world: int, me: dict[str, Any], place: str, deadline: float
) -> dict[str, Any]:
    """Wait for all ranks, on rank 0, and decide whether they can begin."""
    came = {0: me}
    missing = list(range(1, world))
    last = deadline if me["mistake"] is None else time.monotonic() + MISTAKE_SECONDS

    def all_there() -> bool:
        nonlocal last
        for rank in [r for r in missing if store.check([f"rank/{r}"])]:
            came[rank] = json.loads(store.get(f"rank/{rank}"))
            missing.remove(rank)
            if came[rank]["mistake"] is not None:
                last = min(last, time.monotonic() + MISTAKE_SECONDS)
        return not missing or time.monotonic() > last

    def awaited() -> str:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        return f"rank {', '.join(map(str, missing[:_SHOWN]))}{more} at {place}"

    _poll(all_there, float("inf"), awaited)
    hosts = [came[rank]["host"] if rank in came else None for rank in range(world)]
    names = [f"rank {rank} on host {host}" for rank, host in enumerate(hosts)]
    mistakes = [came[rank]["mistake"] if rank in came else None for rank in range(world)]
    mistake = in_words(mistakes, names)
    if mistake is not None and missing and len(missing) == world - 1:
        mistake = me["mistake"]  # no other rank is there to confirm it
    absent = f"{awaited()} did not come: {_NOT_THERE}" if missing else None
    return {"mistake": mistake, "missing": absent, "hosts": hosts}
