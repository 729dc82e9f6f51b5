"""The process group: how the ranks of one run find each other and agree.

Works under ``deepspeed``, ``torchrun`` and plain ``python`` (one rank). Everything here is also
right before ``init`` and without any process group, where this process is rank 0 of 1.
"""

import datetime
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from pmp_ds.errors import UserError

T = TypeVar("T")


_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def adopt_slurm() -> None:
    """Under `srun`, one task per rank, take the ranks from SLURM. It is meant when MASTER_ADDR is
    set and no other launcher has set RANK."""
    if "RANK" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    if all(name in os.environ for name in _SLURM.values()):
        os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items()})
        os.environ.setdefault("MASTER_PORT", "29500")


def init(timeout_seconds: float = 1800.0) -> None:
    """Join the process group of the launcher, or make one of a single rank.

    Raises ``torch.distributed.DistError`` when the other ranks do not appear in time.
    """
    if torch_dist.is_initialized():
        return
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Reproducible matrix products on CUDA; has no meaning elsewhere.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory collective for inference; on CPU DeepSpeed would compile it for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Or every torch.empty is filled, and DeepSpeed's buckets are large: most of a CPU step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    deepspeed.init_distributed(
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    if device().type == "cuda":
        torch.cuda.set_device(device())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def ranks_in_words() -> str:
    """`1 rank`, `8 ranks`."""
    return f"{world_size()} rank{'s' if world_size() > 1 else ''}"


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over the ranks in place and return it."""
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: T) -> list[T]:
    """``value`` of every rank, in rank order; for small objects."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's ``value`` on every rank; for small objects."""
    if world_size() == 1:
        return value
    holder: list[Any] = [value]
    torch_dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_rank0(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its (small) result on every rank. A UserError is raised
    on every rank, so that none waits for another."""
    outcome: tuple[str | None, Any] = (None, None)
    if rank() == 0:
        try:
            outcome = (None, action())
        except UserError as error:
            outcome = (str(error), None)
    message, result = broadcast_object(outcome)
    if message is not None:
        raise UserError(message)
    return result


class SideChannel:
    """A process group of its own in CPU memory: what another thread talks over, or the main thread
    without waiting for the device. Its calls are collective like any other. A context: its threads
    and connections end with it, unless an error leaves, when another rank may still be waiting."""

    def __init__(self) -> None:
        self._group = torch_dist.new_group(backend="gloo") if world_size() > 1 else None

    def __enter__(self) -> "SideChannel":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """The last call; nothing may be under way on it."""
        if self._group is not None:
            torch_dist.destroy_process_group(self._group)
            self._group = None

    def all_gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order; for small objects."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * world_size()
        torch_dist.all_gather_object(values, value, group=self._group)
        return values

    def all_gather_numbers(self, numbers: Sequence[float]) -> torch.Tensor:
        """(world_size, n) fp64: ``numbers`` of every rank. One message, for every update."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        if self._group is None:
            return mine[None]
        gathered = [torch.empty_like(mine) for _ in range(world_size())]
        torch_dist.all_gather(gathered, mine, group=self._group)
        return torch.stack(gathered)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or did not answer in time."""
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def barrier() -> None:
    """Wait for every rank."""
    all_gather_object(None)


def shutdown() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
