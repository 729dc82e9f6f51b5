"""`train.micro_batch_size: auto`: as many sequences at once as the memory of every rank allows.

Two trials on an engine of their own, of one sequence and of two per micro-batch, give the memory of
the model's states and of each sequence. Nothing of them reaches the run but the number, which is
kept in `micro_batch.json`: a resumed run on the same hardware has the same losses to the bit.
"""

import hashlib
import json
import socket
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pmp_ds import dist, verbosity
from pmp_ds.engine.cut import Cut
from pmp_ds.engine.deepspeed_config import OWN_SECTION
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.memory import Meter, free_bytes, hardware
from pmp_ds.errors import UserError
from pmp_ds.foreign import ForeignError, read_object
from pmp_ds.run_dir import RunDir, write_json
from pmp_ds.ticket.scores import find_score
from pmp_ds.ticket.shared import load_together
from pmp_ds.ticket.ticket import has_ticket
from pmp_ds.train.job import Job, given_ticket

USABLE = 0.9  # of the free memory: the rest is for fragmentation, and buffers outside of torch


def sizes(share: int) -> list[int]:
    """Return the micro-batches to choose from: the powers of two and the divisors of a rank's
    ``share`` of sequences, ascending."""
    return [n for n in range(1, share + 1) if share % n == 0 or not n & n - 1]


@dataclass(frozen=True)
class Room:
    """What the fullest rank has and needs, in bytes."""

    free: int
    states: int
    each: int
    """For every sequence of a micro-batch."""

    def largest(self, share: int) -> int:
        """Return the largest power of two, or divisor of a rank's ``share`` of sequences, that
        fits; at least 1."""
        fits = (USABLE * self.free - self.states) // max(self.each, 1)
        return max(n for n in sizes(share) if n == 1 or n <= fits)

    def in_words(self, size: int) -> str:
        fits = self.states + size * self.each <= USABLE * self.free
        return (
            f"states {_size(self.states)} + {size} x {_size(self.each)} activations "
            f"{'<=' if fits else '>'} {USABLE:.0%} of {_size(self.free)} free"
            + ("" if fits else ": memory may run out")
        )


def fitted(job: Job) -> Job:
    """Return ``job`` with a number for `train.micro_batch_size: auto`; with a number it stays as it
    is. Prints the arithmetic. Collective."""
    train, world = job.config.train, dist.world_size()
    if train.micro_batch_size != "auto":
        return job
    where = _where(job)
    known = dist.on_rank0(lambda: _read(job.run))
    if where in known:
        size, why = known[where], f"as before on {where.rpartition(',')[0]}"
    else:
        room = _measure(job)
        size = room.largest(-(-train.global_batch_size // world))
        why = room.in_words(size)
        dist.on_rank0(lambda: _write(job.run, known | {where: size}))
    train = replace(train, micro_batch_size=size)
    if dist.rank() == 0 and verbosity.informs():
        print(f"micro-batch {size}: {why}\n  {Cut.of(train, world).in_words()}", flush=True)
    return replace(job, config=replace(job.config, train=train))


def _where(job: Job) -> str:
    """Return what the number depends on and a restart may change: hardware, ranks, settings."""
    kinds = sorted(set(dist.all_gather_object(hardware(dist.device()))))
    train = job.config.train
    settings = [train.activation_checkpointing, train.compile, job.ds_config]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{dist.ranks_in_words()} of {' or '.join(kinds)}, settings {digest[:16]}"


def _measure(job: Job) -> Room:
    """Return the memory of the rank that has least of it. Collective."""
    device = dist.device()
    # Ranks on CPU share the memory of their host; a GPU has one rank.
    place = socket.gethostname() if device.type == "cpu" else dist.rank()
    found = dist.all_gather_object((place, free_bytes(device)))
    places = [place for place, _ in found]
    free = min(num_bytes // places.count(place) for place, num_bytes in found)
    try:
        one, two = _trials(job, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "train.micro_batch_size=auto: not even two sequences fit on this device "
            f"({hardware(device)}): set it to 1, or choose train.activation_checkpointing=full or "
            f"a DeepSpeed JSON with more ZeRO or offload: {str(error).partition('.')[0]}"
        ) from None
    peaks = dist.all_gather_object((one, two))
    each = max(two - one for one, two in peaks)
    return Room(free, max(one for one, _ in peaks) - each, each)


def _trials(job: Job, device: torch.device) -> tuple[int, int]:
    """Return the most bytes that this rank holds in an update with one sequence per micro-batch,
    and with two. Collective."""
    folder = job.run.ticket if has_ticket(job.run.ticket) else given_ticket(job.config, job.run)
    ticket = None if folder is None else load_together(folder)
    world = dist.world_size()
    train = replace(job.config.train, micro_batch_size=1, global_batch_size=2 * world)
    zero = {n: v for n, v in job.ds_config.items() if n in ("zero_optimization", OWN_SECTION)}
    cuda = [device] if device.type == "cuda" else []
    with Meter(device) as meter, torch.random.fork_rng(cuda):
        work = job.work("train", job.config.data.seed, train.steps, ticket)
        fill = _zeros if work.fill is not None and job.initial.is_gone else work.fill
        engine = Engine(work.model, train, zero, work.objective, fill)
        engine.arm(work.mask)
        scores = _scores(job, engine) if ticket is None else []
        with work.loader(4 * world, 0) as loader:
            rows = loader.next()
        peaks = [meter.peak_of(partial(engine.trial, part)) for part in (rows[:2], rows)]
        del scores
        engine.close()
    if cuda:
        torch.cuda.empty_cache()
    return peaks[0], peaks[1]


def _zeros(_name: str, _start: int, count: int) -> torch.Tensor:
    """Stand in for the base of a run that resumes without it."""
    return torch.zeros(count)


def _scores(job: Job, engine: Engine) -> list[torch.Tensor]:
    """Return tensors like the running scores of discovery, where that is yet to come."""
    if job.config.mask.source != "earlybird" or find_score(job.config.mask.score).add is None:
        return []
    shards = engine.shards
    return [torch.zeros(f.numel, device=shards.flats[f.flat].device) for f in shards.fragments]


def _read(run: RunDir) -> dict[str, int]:
    """Return the numbers of earlier starts; none if they cannot be read."""
    try:
        found: Any = read_object(run.micro_batch)
    except ForeignError:
        return {}
    return {where: n for where, n in found.items() if type(n) is int and n >= 1}


def _write(run: RunDir, sizes: dict[str, int]) -> None:
    try:
        write_json(run.micro_batch, sizes)
    except OSError as error:
        raise UserError(f"{run.micro_batch} cannot be written: {error}") from None


def _size(num_bytes: float) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e8 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"
