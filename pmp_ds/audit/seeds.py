"""Attacks on the initial weights: draw theta(0) again and find weights that never moved.

A complement that equals a guessed theta(0) bit for bit, in the release's dtype, reveals the whole
mask.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case, Weights
from pmp_ds.model.build import build_model
from pmp_ds.model.secret_init import initialize

USUAL_SEEDS = (42, 0, 1, 1234, 1337)
_PROBE = 512  # elements compared for each seed of the search
UNRELATED = 0.02
"""Most equal elements of two unrelated weights; random draws agree on 0.5% in bf16."""

_SECRET = "secret initial weights (init.seed unset: 256-bit ChaCha20 key)"


def seed_replay(case: Case) -> Finding:
    """Compare with theta(0) of the recipe's seed, or of common seeds."""
    seed = case.config.init.seed if case.config else None
    best = (-1.0, torch.empty(0), -1)
    deadline = time.monotonic() + case.seconds
    tried = []
    for guess in USUAL_SEEDS if seed is None else (seed,):
        moved = _moved(case, guess)
        tried.append(str(guess))
        best = max(best, (float((moved == 0).float().mean()), moved, guess), key=lambda b: b[0])
        if time.monotonic() > deadline:
            break
    share, moved, guess = best
    note = f"seeds {', '.join(tried)}: {share:.2%} of all elements equal theta(0) of {guess}"
    return Finding(note=note, scores=moved, evidence=share > UNRELATED)


def seed_search(case: Case) -> Finding:
    """Try seeds in turn on a few elements, and compare with theta(0) of the first that fits."""
    replay = _Replay(case.release)
    deadline = time.monotonic() + case.seconds
    start, tried = time.monotonic(), 0
    for seed in case.seeds:
        if time.monotonic() > deadline and tried:
            break
        tried += 1
        if replay.matches(seed) > UNRELATED:
            moved = _moved(case, seed)
            share = float((moved == 0).float().mean())
            if share > UNRELATED:
                note = f"seed {seed} found after {tried:,}: {share:.2%} of all elements equal it"
                return Finding(note=note, scores=moved, evidence=True)
    hours = (time.monotonic() - start) / tried * 2**32 / 3600
    note = (
        f"none of {tried:,} seeds from {case.seeds.start} on; all 2^32 would take {hours:,.0f} "
        "core-hours with this plain search"
    )
    return Finding(note=note, scores=torch.ones(sum(case.sizes())), evidence=False)


def initial_model(weights: Weights, seed: int) -> PreTrainedModel:
    """Return theta(0) of a public seed for the architecture of ``weights``."""
    model = build_model(weights.config)
    initialize(model, seed)
    return model


def _moved(case: Case, seed: int) -> torch.Tensor:
    """Return 1 where the release differs from theta(0) of ``seed`` in its dtype, (n,) fp32."""
    initial = dict(initial_model(case.release, seed).named_parameters())

    def differs(name: str) -> torch.Tensor:
        stored = case.release.tensor(name)
        return stored != initial[name].detach().to(stored.dtype)

    return case.gather(differs)


class _Replay:
    """Draws only the part of theta(0) needed for one parameter, with the same random operations as
    the model's construction up to that parameter's last fill."""

    def __init__(self, weights: Weights) -> None:
        recorder = _Recorder()
        with recorder:
            model = build_model(weights.config)
        name, self._before, self._fill = recorder.first_final(model)
        stored = weights.tensor(name).reshape(-1)
        self._stored = stored[:: max(1, stored.numel() // _PROBE)]
        self._stride = max(1, stored.numel() // _PROBE)

    def matches(self, seed: int) -> float:
        """Return the share of the probed elements that equal the release's."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for fill in self._before:
                fill()
            drawn = self._fill().reshape(-1)[:: self._stride]
        return float((drawn.to(self._stored.dtype) == self._stored).float().mean())


class _Recorder(TorchDispatchMode):
    """Records every random fill: its operation, and the memory it filled."""

    def __init__(self) -> None:
        super().__init__()
        self._fills: list[tuple[int, Callable[[], torch.Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            shape, rest, named = args[0].shape, args[1:], dict(kwargs or {})

            def again() -> torch.Tensor:
                scratch = torch.empty(shape)
                func(scratch, *rest, **named)
                return scratch

            self._fills.append((args[0].data_ptr(), again))
        return func(*args, **(kwargs or {}))

    def first_final(
        self, model: PreTrainedModel
    ) -> tuple[str, list[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]:
        """Return the parameter whose last fill comes first, the fills before it, and that fill."""
        last = {address: number for number, (address, _) in enumerate(self._fills)}
        candidates: Iterator[tuple[int, str]] = (
            (last[p.data_ptr()], name)
            for name, p in model.named_parameters()
            if p.data_ptr() in last and p.numel() >= _PROBE
        )
        number, name = min(candidates)
        return name, [fill for _, fill in self._fills[:number]], self._fills[number][1]


ATTACKS = (
    Attack(
        name="seed replay",
        needs="the recipe's seed, or a usual one",
        run=seed_replay,
        preventable=True,
        countermeasure=_SECRET,
        use_quota=False,
    ),
    Attack(
        name="seed brute force",
        needs="torch's CPU generator",
        run=seed_search,
        preventable=True,
        countermeasure=_SECRET,
        use_quota=False,
    ),
)
