"""Element-wise optimizers whose state exists only for the ticket (paper, Eq. 5).

Each tensor given to the optimizer (a parameter, or the flat fp32 master partition of a ZeRO rank)
is armed with the packed mask of its elements. State is compact: one value per kept element, in
row-major order. The other elements are never written: no momentum, no weight decay, no rounding.

A subclass (masked_adamw.py, masked_rules.py) adds the update rule and the settings it reads.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from pmp_ds.config import TrainConfig
from pmp_ds.errors import UserError
from pmp_ds.optim.kernels import kernels_for
from pmp_ds.optim.zero_shards import ZeroShards
from pmp_ds.ticket.mask import check_bits, popcount, unpack

CHUNK = 1 << 20  # elements gathered at once; a multiple of 8

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


class MaskedOptimizer(torch.optim.Optimizer):
    """An optimizer that applies ``rule`` to the kept elements of each tensor, once armed.

    State per tensor: `step` () fp32 and each of ``moments`` (num_kept,) fp32. ``step`` accepts
    groups in any order and number, because ZeRO steps them one by one.

    With ``compact_master`` the tensors hold 16-bit weights, and the state includes the fp32
    `master` weights of kept elements (8.5 instead of 9.7 bytes per parameter at density 0.7).
    """

    moments: ClassVar[tuple[str, ...]]

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        """Return the rule's own hyper-parameters, without learning rate and weight decay."""
        raise NotImplementedError

    @classmethod
    def moment_bytes(cls, num_elements: int) -> int:
        """Return the size in bytes of the moments of ``num_elements`` trained elements."""
        return 4 * len(cls.moments) * num_elements

    def __init__(
        self, params: Params, defaults: dict[str, Any], *, compact_master: bool = False
    ) -> None:
        super().__init__(params, defaults)
        self.compact_master = compact_master
        self.gradient_factor: torch.Tensor | None = None
        """Factor on fp32 gradients before a compact master is updated, () fp32."""
        self.paused = False
        """While True, ``step`` changes neither weights nor state."""
        self._masks: dict[torch.Tensor, Mask] | None = None

    def rule(
        self,
        weights: torch.Tensor,  # (n,) fp32, updated in place, as are the moments
        gradient: torch.Tensor,  # (n,) fp32
        moments: list[torch.Tensor],  # (n,) fp32 each, in the order of ``moments``
        group: dict[str, Any],
        step: float,  # the number of this update, from 1
    ) -> None:
        """Update n elements, each independently of the others."""
        raise NotImplementedError

    def arm(self, bits: dict[torch.Tensor, torch.Tensor | None]) -> None:
        """Fix the mask of every tensor and start from fresh moments.

        ``bits`` maps each tensor of this optimizer to its packed mask, (ceil(numel / 8),) uint8 on
        the tensor's device, or to None to train all of it. Raises UserError for other bits.
        """
        for tensor, mask_bits in bits.items():
            if mask_bits is not None:
                check_bits(mask_bits, tensor.numel(), "a packed mask")
                if mask_bits.device != tensor.device:
                    raise UserError(
                        f"a packed mask is on {mask_bits.device}, its tensor on {tensor.device}"
                    )
        self._masks = {tensor: Mask(mask, tensor) for tensor, mask in bits.items()}
        self.state.clear()
        for tensor, mask in self._masks.items():
            state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32)}
            for name in self.moments:
                state[name] = torch.zeros(mask.num_kept, device=tensor.device)
            if self.compact_master:
                state["master"] = mask.gather(tensor.detach().view(-1)).float()
            self.state[tensor] = state

    def zero_complement(self, shards: ZeroShards) -> None:
        """Zero the reduced gradient of every element outside the mask."""
        assert self._masks is not None
        for f, gradient in zip(shards.fragments, shards.gradients(), strict=True):
            mask = self._masks[shards.flats[f.flat]]
            if mask.bits is not None:
                zero = mask.kernels.zero_complement if mask.kernels else zero_complement_ref
                zero(gradient, mask.bits, f.flat_start)

    def bits(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the packed mask of a tensor, or None when all of it is kept."""
        assert self._masks is not None
        return self._masks[tensor].bits

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer that was armed with the same masks.

        Unlike torch's own method, this keeps fp32 state in fp32 when weights are 16-bit. Raises
        ValueError when the state belongs to other masks.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        states = {}
        for index, tensor in zip(saved, tensors, strict=True):
            state = state_dict["state"].get(index, {})
            for name, mine in self.state.get(tensor, {}).items():
                if name not in state or state[name].shape != mine.shape:
                    raise ValueError(f"the saved {name} belongs to another mask or optimizer")
            states[tensor] = {k: v.to(tensor.device, copy=True) for k, v in state.items()}
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for tensor, state in states.items():
            self.state[tensor] = state | {"step": state["step"].cpu()} if state else state

    @property
    def num_updates(self) -> int:
        """Return the number of updates since ``arm``."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of moments, compact master and packed masks on this rank."""
        assert self._masks is not None
        tensors = [mask.bits for mask in self._masks.values() if mask.bits is not None]
        for state in self.state.values():
            tensors += [value for name, value in state.items() if name != "step"]
        return sum(tensor.nbytes for tensor in tensors)

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch declares two overloads of it
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not armed: DeepSpeed 0.19.8 steps once inside `initialize` at stage 0 with fp32 masters.
        if self._masks is None or self.paused:
            return loss
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    state = self.state[tensor]
                    # Not in place: ZeRO-3 may share one `step` tensor between sub-groups.
                    state["step"] = state["step"] + 1
                    self.update(tensor, self._masks[tensor], state, group)
        return loss

    def update(
        self, tensor: torch.Tensor, mask: "Mask", state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Apply ``rule`` to the kept elements of ``tensor`` in torch operations, in chunks."""
        assert tensor.grad is not None
        weights, gradient = tensor.view(-1), tensor.grad.reshape(-1)
        done = 0
        for start in range(0, weights.numel(), CHUNK):
            p, g = weights[start : start + CHUNK], gradient[start : start + CHUNK]
            kept = None
            if mask.bits is not None:
                kept = unpack(mask.bits, p.numel(), start).nonzero().view(-1)
                g = g[kept]
            span = slice(done, done + g.numel())
            done = span.stop
            if self.compact_master:
                values = state["master"][span]
                g = g.float()
                if self.gradient_factor is not None:
                    g = g * self.gradient_factor
            else:
                values = p if kept is None else p[kept]
            self.rule(
                values, g, [state[name][span] for name in self.moments], group, float(state["step"])
            )
            if kept is not None:
                p[kept] = values.to(p.dtype)
            elif self.compact_master:
                p.copy_(values)


class Mask:
    """The packed mask of one tensor, with the kernels for its device and their prefix sums."""

    def __init__(self, bits: torch.Tensor | None, tensor: torch.Tensor) -> None:
        self.bits = bits
        self.num_kept = tensor.numel() if bits is None else popcount(bits)
        self.kernels = kernels_for(tensor)
        self.prefix = None
        if bits is not None and self.kernels:
            self.prefix = self.kernels.block_prefix(bits)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return a copy of the kept ones of (numel,) values, (num_kept,)."""
        if self.bits is None:
            return values.clone()
        parts = [
            chunk[unpack(self.bits, chunk.numel(), i * CHUNK)]
            for i, chunk in enumerate(values.split(CHUNK))
        ]
        return torch.cat(parts)


def zero_complement_ref(gradient: torch.Tensor, bits: torch.Tensor, start: int) -> None:
    """Zero each element i of ``gradient`` whose bit ``start + i`` is 0, in place."""
    for first in range(0, gradient.numel(), CHUNK):
        chunk = gradient[first : first + CHUNK]
        kept = unpack(bits, chunk.numel(), start + first)
        chunk.masked_fill_(~kept, 0.0)  # a product would keep NaN


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return two groups: matrices with ``weight_decay``, vectors (norms, biases) without."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
