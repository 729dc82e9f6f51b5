"""The process group: how the ranks of one run meet and agree.

It works under ``deepspeed``, ``torchrun`` and plain ``python`` (one rank). Everything here also
works before ``init`` and without a process group: this process is then rank 0 of 1.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist

from pmp_ds import heap, verbosity
from pmp_ds.errors import SharedError, UserError
from pmp_ds.meeting import Meeting, in_words, meet

T = TypeVar("T")


MEET_SECONDS = 1800.0
"""Seconds that ranks wait for each other at the start."""

_meeting: Meeting | None = None
_host_group: Any = None  # gloo's, beside NCCL
_waits = 0  # calls of on_rank0, the same number on every rank


def init(
    run: str | None = None, mistake: str | None = None, timeout_seconds: float = 1800.0
) -> None:
    """Meet the other ranks of this job (meeting.py) and join their process group, or make one for a
    single rank. ``timeout_seconds`` limits a collective.

    ``run`` names the run, ``mistake`` the reason why this rank cannot train it. Raises UserError
    and LostRankError as ``meeting.meet`` does.
    """
    global _meeting
    if torch_dist.is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    world = int(os.environ.setdefault("WORLD_SIZE", "1"))
    if world > 1:
        _meeting = meet(run, mistake, MEET_SECONDS)
    elif mistake is not None:
        raise UserError(mistake)
    # Makes matrix products on CUDA reproducible; no effect elsewhere.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deepspeed = import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise every torch.empty is filled: most of a CPU step, as DeepSpeed's buckets are large.
    deterministic: Any = torch.utils.deterministic  # the attribute is not in torch's types
    deterministic.fill_uninitialized_memory = False
    heap.return_large_blocks()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    torch_dist.init_process_group(
        get_accelerator().communication_backend_name(),
        store=_meeting.store if _meeting else torch_dist.HashStore(),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=device() if world > 1 and device().type == "cuda" else None,  # as DeepSpeed does
    )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # adopts the group


def import_deepspeed() -> Any:
    """Import deepspeed with the accelerator set and without its messages."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    verbosity.quieten("DeepSpeed")
    # A shared-memory collective for inference, which DeepSpeed 0.19.8 compiles on CPU for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def meeting() -> Meeting | None:
    """Return the meeting of the ranks, or None for a single rank."""
    return _meeting


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def ranks_in_words() -> str:
    """Return `1 rank` or `8 ranks`."""
    return f"{world_size()} rank{'s' if world_size() > 1 else ''}"


def device() -> torch.device:
    """Return the device of this rank."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over the ranks in place and return it. NCCL sums only on the device: what lies
    in host memory (offloaded state) is summed there, over gloo, without waiting for the device.
    Collective."""
    global _host_group
    if world_size() == 1:
        return tensor
    if tensor.device.type == device().type:
        torch_dist.all_reduce(tensor)
        return tensor
    if _host_group is None:  # made by all ranks at once: the same state is offloaded on all
        _host_group = torch_dist.new_group(backend="gloo")
    torch_dist.all_reduce(tensor, group=_host_group)
    return tensor


def all_gather_object(value: T) -> list[T]:
    """Return ``value`` of every rank, in rank order; for small objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on every rank; for small objects."""
    if world_size() == 1:
        return value
    holder: list[Any] = [value]
    torch_dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_rank0(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its (small) result on every rank. The others wait without
    a collective's time limit. A UserError is raised on every rank, so that none waits for
    another."""
    global _waits
    outcome: tuple[str | None, Any] = (None, None)
    if rank() == 0:
        try:
            outcome = (None, action())
        except UserError as error:
            if world_size() == 1:
                raise
            outcome = (str(error), None)
    if _meeting is not None:
        _waits += 1
        if rank() == 0:
            _meeting.store.set(f"waits/{_waits}", "over")
        else:
            _meeting.wait(f"waits/{_waits}")
    message, result = broadcast_object(outcome)
    if message is not None:
        raise SharedError(message)
    return result


def together(action: Callable[[], T], *, patient: bool = False) -> T:
    """Run ``action`` on every rank and return this rank's result. A UserError of any rank is raised
    on all, with the names of the ranks that raised it unless all did. With ``patient`` ranks wait
    for each other without a collective's time limit. Collective."""
    global _waits
    result: T | None = None
    mistake: str | None = None
    try:
        result = action()
    except UserError as error:
        if world_size() == 1:
            raise
        mistake = str(error)
    if patient and _meeting is not None:
        _waits += 1
        _meeting.store.set(f"waits/{_waits}/{rank()}", "over")
        for other in range(world_size()):
            _meeting.wait(f"waits/{_waits}/{other}")
    mistakes = all_gather_object(mistake)
    names = [_meeting.name(r) if _meeting else f"rank {r}" for r in range(world_size())]
    text = in_words(mistakes, names)
    if text is not None:
        raise SharedError(text)
    return cast(T, result)


class SideChannel:
    """A separate process group in CPU memory, for another thread, or for the main thread without
    waiting for the device. Its calls are collective. It is a context that closes its threads and
    connections, except on an error, when another rank may still be waiting."""

    def __init__(self) -> None:
        self._group = torch_dist.new_group(backend="gloo") if world_size() > 1 else None

    def __enter__(self) -> "SideChannel":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Close the channel, with no call in progress."""
        if self._group is not None:
            torch_dist.destroy_process_group(self._group)
            self._group = None

    def all_gather(self, value: T) -> list[T]:
        """Return ``value`` of every rank, in rank order; for small objects."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        torch_dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather_numbers(self, numbers: Sequence[float]) -> torch.Tensor:
        """Return ``numbers`` of every rank, (world_size, n) fp64, in a single message."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self._group is None:
            return mine[None]
        gathered = [torch.empty_like(mine) for _ in range(world_size())]
        torch_dist.all_gather(gathered, mine, group=self._group)
        return torch.stack(gathered)


def is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone or did not answer in time."""
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def barrier() -> None:
    """Wait for every rank."""
    all_gather_object(None)


def shutdown() -> None:
    global _host_group
    _host_group = None
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
