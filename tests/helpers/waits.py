"""Count the operators that make the host wait for the device, per update and by caller. This works
on CPU as well, where nothing waits but the operators are the same."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmp_ds import dist
from pmp_ds.engine.clock import Later
from pmp_ds.train import pipeline
from pmp_ds.train.session import Training
from pmp_ds.watch.watchdog import Watchdog

_ASKING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_same_size"}
"""Operators whose result the host must know."""


class _Counting(TorchDispatchMode):
    def __init__(self, training: Training) -> None:
        super().__init__()
        self._states = training.engine.optimizer.state
        self.doing = ""
        self.found: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        asks = name in _ASKING or (name.startswith("index") and _by_bools(args))
        if asks and not any(args[0] is state["step"] for state in self._states.values()):
            self.count(name)  # `step` is in host memory everywhere
        return func(*args, **(kwargs or {}))

    def count(self, what: str) -> None:
        self.found.setdefault(self.doing, Counter())[f"{_who()}: {what}"] += 1


def _by_bools(args: Any) -> bool:
    """Return whether this is `x[mask]`, which counts the mask's ones first."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _who() -> str:
    """Return the package of ours or of DeepSpeed's that calls; the C++ kernel's checks call only on
    CPU."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in ("pmp_ds", "deepspeed"):
            return "kernel" if frame.f_code.co_name == "_num_kept" else package
        frame = frame.f_back
    return "others"


@contextlib.contextmanager
def counted(into: dict[str, Counter[str]]) -> Iterator[None]:
    """Count within masked pretraining; ``into`` receives the counts by the watchdog's labels."""
    train, beat, gather = pipeline.train, Watchdog.beat, dist.SideChannel.all_gather_numbers
    all_gather, send, read = dist.SideChannel.all_gather, Later.__init__, Later.read

    def counting_train(training: Training) -> None:
        mode = _Counting(training)

        def told(self: Watchdog, doing: str) -> None:
            mode.doing = doing
            beat(self, doing)

        def numbers(self: dist.SideChannel, values: Any) -> torch.Tensor:
            mode.count("gather")
            return gather(self, values)

        def objects(self: dist.SideChannel, value: Any) -> list[Any]:
            mode.count("gather")
            return all_gather(self, value)

        def sent(self: Later, numbers: torch.Tensor) -> None:
            send(self, numbers)
            vars(self)["sent"] = mode.doing

        def read_late(self: Later) -> list[float]:
            if vars(self)["sent"] == mode.doing:
                mode.count("read in the update that sent it")
            return read(self)

        with (
            mode,
            mock.patch.object(Later, "__init__", sent),
            mock.patch.object(Later, "read", read_late),
            mock.patch.object(Watchdog, "beat", told),
            mock.patch.object(dist.SideChannel, "all_gather_numbers", numbers),
            mock.patch.object(dist.SideChannel, "all_gather", objects),
        ):
            train(training)
        into.update(mode.found)

    with mock.patch.object(pipeline, "train", counting_train):
        yield
