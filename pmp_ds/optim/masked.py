"""Element-wise optimizers whose state exists only for the ticket (paper, Eq. 5).

Each tensor that the optimizer is given (a parameter, or the flat fp32 master partition of a ZeRO
rank) is armed with the packed mask of its elements. State is compact: one value per kept element,
in row-major order. The other elements are never written: no momentum, no weight decay, no rounding.
Moments and master weights may take fewer bits than fp32 (low_bit.py).

A subclass (masked_adamw.py, masked_rules.py) adds the rule, the settings it takes from a run and,
if the operators of kernels/ implement it, their coefficients; update.py applies it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from pmp_ds.config import TrainConfig
from pmp_ds.config.moments import FP32, MomentFormat
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import shape_of
from pmp_ds.optim.kernels import Kernels, kernels_for
from pmp_ds.optim.kernels.batch import Coefficients, Layout, Master, Segment, Tensors
from pmp_ds.optim.stored import EXPONENTS, MASTER_STATE, fresh_moments, kept_master
from pmp_ds.optim.update import Update
from pmp_ds.ticket.mask import check_bits

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]]
PerSegment = Sequence[torch.Tensor | None]
"""A tensor of (numel,) elements, or None, for each segment that ``arm`` was given."""


class MaskedOptimizer(torch.optim.Optimizer):
    """Applies ``rule`` to the kept elements of each tensor. Does nothing until ``arm`` is called.

    State per tensor: `step` () fp32 and each of ``moments`` (num_kept,) in the dtype of
    ``moment_format``; 8-bit moments also have their exponents, as `exp_avg_exponents` (num_blocks,)
    uint8. Groups may come in any order and number at each ``step``, as ZeRO passes them one by one.

    ``master``: with `compact` the tensors hold 16-bit weights and the fp32 `master` weights are
    state as well, for kept elements only (8.5 instead of 9.7 bytes per parameter at density 0.7);
    with `split`, the lower bits of these weights are, `master_low` (num_kept,) int16 (7.1 bytes).
    """

    moments: ClassVar[tuple[str, ...]]
    squares: ClassVar[tuple[str, ...]] = ()
    """Those among ``moments`` that are never negative, and divided by."""

    @classmethod
    def settings(cls, config: TrainConfig) -> dict[str, Any]:
        """Return the rule's own hyper-parameters of a run: all but learning rate and decay."""
        raise NotImplementedError

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        master: Master = "dense",
        moment_format: MomentFormat = FP32,
    ) -> None:
        super().__init__(params, defaults)
        self.master, self.moment_format = master, moment_format
        self._masks: dict[torch.Tensor, torch.Tensor | None] | None = None
        self._segments: tuple[Segment, ...] = ()
        self._groups: dict[torch.Tensor, int] = {}
        self._kernels: tuple[Kernels, Layout] | None = None

    def rule(
        self,
        weights: torch.Tensor,  # (n,) fp32, updated in place, as are the moments
        gradient: torch.Tensor,  # (n,) fp32
        moments: list[torch.Tensor],  # (n,) fp32 each, in the order of ``moments``
        group: dict[str, Any],
        step: float,  # counts this update, from 1
    ) -> None:
        """Update n elements, each on its own, in torch operations."""
        raise NotImplementedError

    def coefficients(self, group: dict[str, Any], step: float) -> Coefficients | None:
        """Return what the operators need for update ``step``, or None if they lack the rule."""
        return None

    def arm(
        self,
        bits: dict[torch.Tensor, torch.Tensor | None],
        segments: Sequence[Segment] | None = None,
        groups: Sequence[int] = (),
        drop_masters: Callable[[], None] = lambda: None,
    ) -> None:
        """Fix the mask of every tensor and start from fresh moments.

        ``bits``: for each tensor of this optimizer its packed mask (ceil(numel / 8),) uint8 on the
        tensor's device, or None to train all of it. ``segments``: the runs of elements that
        ``update`` gets gradients of, in the order of ``bits`` and then of elements; whole tensors
        by default. No other element is ever updated. ``groups``: by tensor, the number of its
        parameter group, for tensors that no group lists: ZeRO-3 empties the groups between steps.
        ``drop_masters`` frees dense masters, of which a compact or split one has taken what it
        needs; moments are made only then. Raises UserError for other bits.
        """
        for tensor, mask in bits.items():
            if mask is not None:
                check_bits(mask, tensor.numel(), "a packed mask")
                if mask.device != tensor.device:
                    raise UserError(
                        f"a packed mask is on {mask.device} and its tensor on {tensor.device}"
                    )
        if segments is None:
            segments = [Segment(i, 0, tensor.numel()) for i, tensor in enumerate(bits)]
        self._masks, self._segments = dict(bits), tuple(segments)
        self._groups = dict(zip(bits, groups, strict=True)) if groups else {}
        self.state.clear()
        for tensor, mask in bits.items():
            self.state[tensor] = kept_master(tensor, mask, self.master)
        self._kernels = None
        if self.coefficients(self.defaults, 1.0) is not None:
            kernels = kernels_for(list(bits), master=self.master)
            if kernels is not None:
                device = next(iter(bits)).device
                self._kernels = kernels, Layout(self._segments, list(bits.values()), device)
        if self.master != "dense":
            drop_masters()
        for i, (tensor, mask) in enumerate(bits.items()):
            blocks = sum(s.num_blocks for s in segments if s.tensor == i)
            moments = fresh_moments(tensor, mask, blocks, self.moments, self.moment_format)
            step = torch.zeros((), dtype=torch.float32)
            self.state[tensor] = {"step": step, **moments, **self.state[tensor]}

    def bits(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the packed mask of a tensor; None when all of it is kept."""
        assert self._masks is not None
        return self._masks[tensor]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer that was armed with the same masks.

        Unlike torch's own, keeps fp32 state fp32 when weights are 16-bit. Raises ValueError when
        the state belongs to other masks.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        states = {}
        for index, tensor in zip(saved, tensors, strict=True):
            state = state_dict["state"].get(index, {})
            for name, mine in self.state.get(tensor, {}).items():
                theirs = state.get(name)
                if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                    raise ValueError(f"the saved {name} belongs to another mask or optimizer")
            states[tensor] = {k: v.to(tensor.device, copy=True) for k, v in state.items()}
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for tensor, state in states.items():
            self.state[tensor] = state | {"step": state["step"].cpu()} if state else state

    @property
    def signed(self) -> tuple[bool, ...]:
        """Whether each of ``moments`` may be negative."""
        return tuple(name not in self.squares for name in self.moments)

    @property
    def num_updates(self) -> int:
        """Return the number of updates since ``arm``."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of moments, compact or split master and packed masks on this rank."""
        assert self._masks is not None
        tensors = [mask for mask in self._masks.values() if mask is not None]
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
        if self._masks is not None:  # DeepSpeed steps once inside `initialize`
            given = {t: t.grad for group in self.param_groups for t in group["params"]}
            tensors = list(self._masks)
            gradients = [given.get(tensors[s.tensor]) for s in self._segments]
            self.update(
                [
                    None if g is None else _part(g.reshape(-1), s)
                    for g, s in zip(gradients, self._segments, strict=True)
                ]
            ).make()
        return loss

    def update(self, gradients: PerSegment, weights: PerSegment | None = None) -> Update:
        """Return the update of the segments that have a gradient; it is not made yet.

        ``gradients``: fp32 or 16-bit. ``weights``: what receives the updated weights, rounded, in
        fp32 or 16-bit; None where the armed tensors themselves are what the model computes with.
        """
        assert self._masks is not None
        tensors, masks = list(self._masks), list(self._masks.values())
        groups = {t: self.param_groups[number] for t, number in self._groups.items()}
        groups |= {t: group for group in self.param_groups for t in group["params"]}
        found, blocks = [], dict.fromkeys(range(len(tensors)), 0)  # those before, by tensor
        for i, (s, gradient) in enumerate(zip(self._segments, gradients, strict=True)):
            tensor = tensors[s.tensor]
            state, own = self.state[tensor], _part(tensor.detach().view(-1), s)
            exponents = ()
            if self.moment_format.has_exponents:
                here = slice(blocks[s.tensor], blocks[s.tensor] + s.num_blocks)
                exponents = tuple(state[name + EXPONENTS][here] for name in self.moments)
                blocks[s.tensor] = here.stop
            apart = self.master != "dense"
            found.append(
                Tensors(
                    gradient=gradient,
                    weights=weights[i] if weights is not None else own if apart else None,
                    master=state[MASTER_STATE[self.master]] if apart else own,
                    moments=tuple(state[name] for name in self.moments),
                    exponents=exponents,
                    mask=masks[s.tensor],
                    state=state,
                    group=groups.get(tensor, self.defaults),  # without a gradient
                )
            )
        return Update(self, self._segments, found, self._kernels)


def _part(flat: torch.Tensor, s: Segment) -> torch.Tensor:
    return flat[s.start : s.start + s.numel]


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Return two groups: matrices with ``weight_decay``, vectors (norms, biases) without."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if len(shape_of(parameter)) >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
