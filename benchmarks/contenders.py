"""The ways to make a training update that benchmarks/step.py compares.

Each runs as its user would run it: ours with deterministic operators, as the product sets them, and
with ``train.compile``; DeepSpeed and torch without them, with the loss that transformers computes
from labels.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import find_ninja
from benchmarks.shapes import Setup
from pmp_ds import dist
from pmp_ds.engine.engine import Engine
from pmp_ds.engine.forward import compile_layers
from pmp_ds.model.attention import plain_attention
from pmp_ds.model.parameters import parameter_table
from pmp_ds.optim.masked import parameter_groups


class Contender(Protocol):
    """A model with its optimizer."""

    title: str
    deterministic: bool

    def backward(self) -> None:
        """Compute the gradients of one update, for this rank's share of the batch."""
        ...

    def step(self) -> None:
        """Clip them and update the weights."""
        ...


class Ours:
    """The masked engine of the product, or with ``masked=False`` the same engine without a mask."""

    deterministic = True

    def __init__(self, setup: Setup, *, masked: bool = True) -> None:
        self.title = "ours, masked" if masked else "ours, no mask"
        model = plain_attention(setup.model(), setup.num_tokens)
        mask = setup.mask(model) if masked else None
        self.table = parameter_table(model)
        self._setup = setup
        self.engine = Engine(model, setup.train, _zero(setup))
        self.engine.arm(mask)

    def backward(self) -> None:
        self.engine.backward(self._setup.batch)

    def step(self) -> None:
        self.engine.step(self._setup.train.lr)


class PlainDeepSpeed:
    """DeepSpeed with the optimizer that its JSON gives: FusedAdam, on CPU built from the sources of
    DeepSpeedCPUAdam, under offload the latter; torch's AdamW where it cannot be built. ``compiled``
    compiles the layers that ours compiles."""

    deterministic = False

    def __init__(self, setup: Setup, *, compiled: bool = False) -> None:
        model = setup.model()
        name, where = "FusedAdam", setup.device
        if setup.options.offload:
            name, where = "DeepSpeedCPUAdam", torch.device("cpu")
        builds = _adam_builds(name, where)
        optimizer = name if builds else "torch AdamW"
        self.title = f"DeepSpeed, {optimizer}" + (", compiled" if compiled else "")
        self._setup = setup
        engine, *_ = dist.import_deepspeed().initialize(
            model=model,
            model_parameters=parameter_groups(model.named_parameters(), setup.train.weight_decay),
            config={
                "train_micro_batch_size_per_gpu": setup.cut.micro_batch_size,
                "gradient_accumulation_steps": setup.cut.accumulation_steps,
                "gradient_clipping": setup.train.clip_norm,
                "bf16": {"enabled": setup.train.precision == "bf16"},
                "optimizer": {
                    "type": "AdamW",
                    "params": _hyper(setup) | {"torch_adam": not builds},
                },
                "steps_per_print": 10**9,
                **_zero(setup),
            },
            dist_init_required=False,
        )
        self._engine: Any = engine
        if compiled:
            compile_layers(model, setup.train, setup.device, setup.stage)

    def backward(self) -> None:
        self._engine.train()
        for i, rows in enumerate(_micro_batches(self._setup)):
            if i:
                self._engine.step()
            self._engine.backward(self._engine(input_ids=rows, labels=rows, use_cache=False).loss)

    def step(self) -> None:
        self._engine.step()


class TorchLoop:
    """A loop without a framework: fp32 weights under autocast, fused AdamW, DistributedDataParallel
    on several ranks. ``offloaded``: the optimizer is in host memory, by torchao, which cannot clip:
    gradients are copied there during the backward pass."""

    deterministic = False

    def __init__(self, setup: Setup, *, compiled: bool, offloaded: bool = False) -> None:
        self.title = "torch, fused AdamW" + (", compiled" if compiled else "")
        self.title += ", torchao's offload" if offloaded else ""
        model: Any = setup.model().to(setup.device)
        groups = parameter_groups(model.named_parameters(), setup.train.weight_decay)
        self._clips = not offloaded
        self._optimizer: Any
        if offloaded:
            from torchao.optim import CPUOffloadOptimizer

            self._optimizer = CPUOffloadOptimizer(groups, fused=True, **_hyper(setup))
        else:
            self._optimizer = torch.optim.AdamW(groups, fused=True, **_hyper(setup))
        self._parameters, self._setup = list(model.parameters()), setup
        self._parallel = dist.world_size() > 1
        if self._parallel:
            model = DistributedDataParallel(model)
        self._model: Any = torch.compile(model) if compiled else model

    def backward(self) -> None:
        setup = self._setup
        self._model.train()
        for i, rows in enumerate(_micro_batches(setup), 1):
            if self._parallel:
                self._model.require_backward_grad_sync = i == setup.cut.accumulation_steps
            with torch.autocast(
                setup.device.type, torch.bfloat16, enabled=setup.train.precision == "bf16"
            ):
                loss = self._model(input_ids=rows, labels=rows, use_cache=False).loss
            (loss / setup.cut.accumulation_steps).backward()

    def step(self) -> None:
        if self._clips:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._setup.train.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _zero(setup: Setup) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.options.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": setup.on_gpu}
    return {"zero_optimization": zero}


def _hyper(setup: Setup) -> dict[str, Any]:
    train = setup.train
    return {"lr": train.lr, "betas": train.betas, "eps": train.eps}


def _micro_batches(setup: Setup) -> Iterator[torch.Tensor]:
    yield from setup.batch.to(setup.device, non_blocking=True).split(setup.cut.micro_batch_size)


def _adam_builds(name: str, device: torch.device) -> bool:
    """Return whether every rank has DeepSpeed's operator, compiled at first use. Collective."""

    find_ninja()

    def build() -> bool:
        from deepspeed.ops import adam

        try:
            getattr(adam, name)([torch.zeros(1, device=device, requires_grad=True)])
        except Exception as error:  # noqa: BLE001 - many things can be missing
            print(f"DeepSpeed's {name} could not be built: {str(error).splitlines()[0][:200]}")
            return False
        return True

    first = dist.on_rank0(build)  # one compiles for all
    return first and all(dist.all_gather_object(build()))
