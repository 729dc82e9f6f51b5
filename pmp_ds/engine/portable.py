"""What a checkpoint reads from a DeepSpeed engine and restores, at any ZeRO stage."""

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from pmp_ds import dist
from pmp_ds.config.moments import FP32
from pmp_ds.model.parameters import constants, shape_of
from pmp_ds.optim.kernels.batch import Master
from pmp_ds.optim.logical_state import MASTER, Collected, Read, collect, restore
from pmp_ds.optim.zero import ZeroShards, shards_of

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Portable(ABC):
    """A DeepSpeed engine's weights and position; subclasses add the optimizer state."""

    _engine: Any
    shards: ZeroShards
    hf_config: Any = None
    """The Hugging Face config to write next to the weights, if any."""

    def parameters(self, mine: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter in global element order: those of ``mine`` (None: all on rank 0)
        whole, on CPU in the training dtype, the others empty. Collective: every rank must consume
        it to the end."""
        # At stage 3 this waits for parameters that an evaluation prefetched (DeepSpeed 0.19.8).
        self._engine.empty_partition_cache()
        for name, param in self._engine.module.named_parameters():
            partitioned = getattr(param, "ds_status", None) is not None
            with deepspeed.zero.GatheredParameters([param], enabled=partitioned):
                assert not partitioned or param.ds_status == ZeroParamStatus.AVAILABLE
                wanted = dist.rank() == 0 if mine is None else name in mine
                whole = (param.detach() if wanted else torch.empty(0)).to("cpu", copy=True)
            yield name, whole

    def constants(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each persistent buffer on CPU in its own dtype."""
        for name, buffer in constants(self._engine.module).items():
            yield name, buffer.to("cpu", copy=True)

    def weight_sizes(self) -> dict[str, int]:
        """Return the bytes of ``parameters`` and ``constants``, by name in their order."""
        module = self._engine.module
        found = {
            name: math.prod(shape_of(param)) * param.element_size()
            for name, param in module.named_parameters()
        }
        return found | {name: buffer.nbytes for name, buffer in constants(module).items()}

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of ``local_state``."""

    @abstractmethod
    def local_state(self) -> Collected:
        """Copy this rank's optimizer state; return a function that converts it to logical form."""

    @abstractmethod
    def counters(self) -> dict[str, float]:
        """Return the number of updates applied by the optimizer (fp16 skips some) and, with a
        dynamic loss scale, the scale and its counters."""

    @property
    def _scaler(self) -> Any:
        """The dynamic loss scaler of fp16, or None."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if all(hasattr(scaler, name) for name in _SCALER) else None

    def _scale_counters(self) -> dict[str, float]:
        return {name: getattr(self._scaler, name) for name in _SCALER} if self._scaler else {}

    def _place(self, step: int, counters: dict[str, float]) -> None:
        """Set DeepSpeed's counters to ``step`` updates."""
        for name in _SCALER if self._scaler else ():
            setattr(self._scaler, name, counters[name])
        self._engine.global_steps = step
        self._engine.micro_steps = step * self._engine.gradient_accumulation_steps()
        self._engine.global_samples = step * self._engine.train_batch_size()


class DenseEngine(Portable):
    """Any DeepSpeed engine whose optimizer is element-wise, with state tensors as large as the
    tensors it updates: AdamW, SGD with momentum, Lion."""

    master: Master = "dense"  # with ``state`` and the like, required by logical_state
    moment_format = FP32

    def __init__(self, engine: Any) -> None:
        self._engine, self.shards = engine, shards_of(engine)
        config = getattr(engine.module, "config", None)
        self.hf_config = config if hasattr(config, "to_dict") else None
        self._has_master = bool(engine.fp16_enabled() or engine.bfloat16_enabled())
        self._optimizer = engine.optimizer
        while hasattr(self._optimizer, "optimizer"):  # unwrap DeepSpeed's optimizers
            self._optimizer = self._optimizer.optimizer

    @property
    def state(self) -> Any:
        return self._optimizer.state

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the state tensors; empty before the first update."""
        flat = self.shards.flats[0]
        state = self.state.get(flat, {}).items()
        return tuple(name for name, value in state if torch.is_tensor(value) and value.dim())

    @property
    def signed(self) -> tuple[bool, ...]:
        return (True,) * len(self.moments)

    @property
    def state_bytes(self) -> int:
        size = sum(flat.nbytes for flat in self.shards.flats)
        return size * (len(self.moments) + self._has_master)

    def local_state(self) -> Collected:
        return collect(self, self.shards, None, master=self._has_master)

    def counters(self) -> dict[str, float]:
        state = self.state.get(self.shards.flats[0], {})
        counts = [state.get("step"), *(g.get("step") for g in self._optimizer.param_groups)]
        applied = max((float(count) for count in counts if count is not None), default=0.0)
        return {"optimizer_step": applied, **self._scale_counters()}

    def restore(
        self, kinds: Iterable[str], read: Read, step: int, counters: dict[str, float]
    ) -> None:
        """Load the state of ``kinds`` after ``step`` updates; the model's weights are already those
        of that update."""
        for flat in self.shards.flats:
            for kind in set(kinds) - {MASTER}:
                self.state[flat][kind] = torch.zeros_like(flat)
        restore(self, self.shards, None, kinds, read, master=self._has_master)
        self._count(counters["optimizer_step"])
        self._place(step, counters)

    def _count(self, applied: float) -> None:
        """Set the optimizer's update count, wherever it keeps the number."""
        groups = [group for group in self._optimizer.param_groups if "step" in group]
        for group in groups:  # DeepSpeed's FusedAdam counts per group
            group["step"] = int(applied)
        if groups or not applied:
            return
        fused = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
        for flat in self.shards.flats:
            count = torch.tensor(applied, device=flat.device if fused else "cpu")
            of_torch = type(self._optimizer).__module__.startswith("torch.")
            self.state[flat]["step"] = count if of_torch else int(applied)
