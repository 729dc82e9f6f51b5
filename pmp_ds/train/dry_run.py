"""The plan of a run that is not started: memory, traffic, disk, time, and what fits.

    print(describe(config, ds_config, Machine(world=8, device_memory=80 * 10**9)))

Nothing is drawn, trained or written; no process group, GPU or data is needed.
"""

import copy
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds.config import Config
from pmp_ds.config.precision import precision_of
from pmp_ds.data.mixed_store import open_data
from pmp_ds.engine.deepspeed_config import merge
from pmp_ds.engine.figures import flops_per_token
from pmp_ds.errors import require
from pmp_ds.foreign import read_object
from pmp_ds.model.build import context_length, model_config
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import constants, num_params, parameter_table
from pmp_ds.model.recipe import NotDescribedError, Recipe
from pmp_ds.model.recipe import describe as describe_model
from pmp_ds.ticket.ticket import exact_k, load_ticket
from pmp_ds.train import fit, plan, wire
from pmp_ds.train.activations import Timeline, timeline
from pmp_ds.train.budget import Budget, Bytes
from pmp_ds.train.micro_batch import USABLE

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}iB": 1024**i for i, unit in enumerate(_UNITS, start=1)}
_VOCABULARY = {"llama": 32_000, "gpt2": 50_257}
_RELEASED = 2  # bytes of a weight in a release: bf16
_SAMPLE = 1 << 20  # elements drawn to measure the rate
_PHASES = ("start", "discovery", "training", "save", "resume")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run would take place; bytes and FLOP/s of one rank."""

    world: int = 1
    device_memory: int | None = None
    host_memory: int | None = None
    device_flops: float | None = None
    mfu: float = 0.4
    block_size: int | None = None
    """Tokens, where there is no store yet."""

    def __post_init__(self) -> None:
        require(self.world >= 1, f"--world-size {self.world} must be at least 1")
        require(0.0 < self.mfu <= 1.0, f"--mfu {self.mfu} must be in (0, 1]")
        size = self.block_size
        require(size is None or size >= 2, f"--block-size {size} must be at least 2")


def bytes_of(text: str | None, flag: str) -> int | None:
    """Return the bytes of `80GB` or `75GiB`; None of None. Raises UserError without a unit."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]i?B)", text.strip())
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    require(size > 0, f"{flag} {text!r} is not a size: write a number and a unit, such as 80GB")
    return size


def flops_of(text: str | None, flag: str) -> float | None:
    """Return the FLOP/s of `989T` or `1.98P`; None of None. Raises UserError without a unit."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*([TP])(?:FLOPS|FLOP/s)?", text.strip())
    rate = float(match[1]) * {"T": 1e12, "P": 1e15}[match[2]] if match else 0.0
    require(rate > 0, f"{flag} {text!r} is not a rate: write a number and T or P, such as 989T")
    return rate


def describe(config: Config, ds_config: dict[str, Any], machine: Machine) -> str:
    """Return the plan as text. Raises UserError for settings that do not go together."""
    merge(ds_config, config.train, machine.world)
    vocabulary, block, eos, assumed = _data(config, machine.block_size)
    hf_config = model_config(
        config.model, vocab_size=vocabulary, eos_id=eos, bos_id=None, block_size=block
    )
    model, recipes, reason = _skeleton(hf_config)
    constant = {n: recipes[n].constant if n in recipes else False for n in _names(model)}
    table = parameter_table(model, constant)
    shapes = {info.name: info.shape for info in table}
    budget = Budget(shapes, _kept(config, num_params(table)), config, ds_config, machine.world)
    buffers = sum(buffer.nbytes for buffer in constants(model).values())
    timelines, unknown = _timelines(hf_config, budget, block)
    now = timelines[config.train.activation_checkpointing == "full"]
    if config.train.micro_batch_size == "auto":
        memory = machine.device_memory
        fits = fit.largest(budget, now, memory) if memory else 1
        budget = fit.with_micro_batch(budget, max(fits, 1))
    rows = plan.basics(budget, block, "a GPU each")
    if assumed:
        rows["assumed"] = assumed
    if unknown:
        rows["unknown"] = unknown
    parts = [
        f"{config.run.name}: a dry run; nothing is trained or written",
        _in_lines(rows),
        _memory(budget, now, machine, drawn_whole=reason is not None),
        _traffic(budget, table),
        _disk(budget, buffers),
        _times(budget, machine, hf_config, block, recipes),
    ]
    if machine.device_memory:
        parts.append(_fits(budget, timelines, machine.device_memory))
    return "\n\n".join(parts)


def _data(config: Config, block_size: int | None) -> tuple[int, int, int, str]:
    """Return vocabulary, tokens of a block and the end-of-text token of the store; or assume them,
    and say so, where there is no store yet."""
    store = config.data.store
    folders = [store] if isinstance(store, str) else list(store)
    if any(Path(folder).exists() for folder in folders):
        data = open_data(store)
        given = f"--block-size {block_size} does not go with {store}, whose blocks have "
        require(block_size in (None, data.block_size), f"{given}{data.block_size} tokens; omit it")
        return data.vocab_size, data.block_size, data.eos_id, ""
    model, where = config.model, "model.vocab_size"
    vocabulary = model.vocab_size or _VOCABULARY.get(model.family)
    if vocabulary is None:
        path = Path(model.path or "")
        where = str(path / "config.json" if path.is_dir() else path)
        values = read_object(Path(where)) if Path(where).is_file() else {"vocab_size": 1}
        vocabulary = int(values.get("vocab_size", 1))
    elif model.vocab_size is None:
        where = f"{model.family}'s own; model.vocab_size"
    longest = model.max_positions
    if model.family == "auto" and block_size is None:
        found = model_config(model, vocab_size=vocabulary, eos_id=0, bos_id=None, block_size=1)
        longest = min(context_length(found), 4096)
    block = block_size or longest
    by = "--block-size" if block_size else "the longest context; --block-size"
    text = f"no store at {', '.join(folders)} yet: a vocabulary of {vocabulary:,} ({where}), "
    return vocabulary, block, 0, f"{text}blocks of {block:,} tokens ({by})"


def _skeleton(
    hf_config: PreTrainedConfig,
) -> tuple[PreTrainedModel, dict[str, Recipe], str | None]:
    """Return a model without memory, the recipes of its initial weights, and why there are none."""
    try:
        return *describe_model(copy.deepcopy(hf_config)), None
    except NotDescribedError as error:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config))
        return model, {}, str(error)


def _names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _kept(config: Config, d: int) -> int:
    mask = config.mask
    if mask.source == "none":
        return d
    if mask.file is not None and Path(mask.file).exists():
        return load_ticket(Path(mask.file)).mask.num_kept
    return exact_k(mask.density, d)


def _timelines(
    hf_config: PreTrainedConfig, budget: Budget, block: int
) -> tuple[dict[bool, Timeline | None], str | None]:
    """Return the timelines without and with recomputation of everything, and what went wrong."""
    dtype = precision_of(budget.config.train).dtype
    found: dict[bool, Timeline | None] = {}
    reason = None
    for recompute in (False, True):
        train = fit.recomputing(budget.config.train, everything=recompute)
        try:
            model = _skeleton(hf_config)[0]
            found[recompute] = timeline(model, train, block, dtype, "cuda")
        except Exception as error:  # noqa: BLE001 - whatever a model of any family does
            found[recompute] = None
            why = str(error).partition("\n")[0]
            reason = f"activations, which are not counted ({hf_config.model_type}: {why})"
    return found, reason


def _memory(budget: Budget, now: Timeline | None, machine: Machine, *, drawn_whole: bool) -> str:
    size, discovers = budget.cut.micro_batch_size, budget.config.mask.source == "earlybird"
    phases = [phase for phase in _PHASES if discovers or phase != "discovery"]
    between, _ = budget.placed(budget.states())
    piece = budget.element * budget.largest * (budget.stage == 3)
    device = {
        "start": budget.start(),
        "discovery": budget.update(now, size, dense=True),
        "training": budget.update(now, size),
        "save": between | {"gathered parameters": piece, "gradients": 0},
        "resume": budget.start(resumed=True),
    }
    host = {phase: budget.host(phase, drawn_whole=drawn_whole) for phase in phases}
    title = "device memory of a rank" + f", micro-batch {size}"
    return "\n\n".join(
        (
            _table(title, {phase: device[phase] for phase in phases}, machine.device_memory),
            _table("host memory of a rank", host, machine.host_memory),
        )
    )


def _table(title: str, columns: Mapping[str, Bytes], limit: int | None) -> str:
    """Return categories by phase, their sums, and whether these fit into ``limit`` bytes."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    names = [name for name in names if any(column.get(name) for column in columns.values())]
    totals = {phase: sum(column.values()) for phase, column in columns.items()}
    unit, word = _unit(max(totals.values()))
    rows = [[f"{title}, {word}", *columns]]
    for name in names:
        sizes = (column.get(name, 0) for column in columns.values())
        rows.append([name, *(f"{size / unit:,.2f}" if size else "-" for size in sizes)])
    rows.append(["total", *(f"{size / unit:,.2f}" for size in totals.values())])
    if limit is not None:
        fits = ["yes" if size <= USABLE * limit else "NO" for size in totals.values()]
        rows.append([f"fits into {USABLE:.0%} of {limit / 1e9:,.2f} GB", *fits])
    return _aligned(rows)


def _traffic(budget: Budget, table: Sequence[Any]) -> str:
    transfers = wire.update(budget)
    if not transfers:
        return "  one rank sends nothing"
    chosen = wire.selection(budget, table) if budget.config.mask.source == "earlybird" else []
    rows = [["sent by a rank in an update", "collective", "tensors", "sent"]]
    for one, purpose in [
        *((one, one.purpose) for one in transfers),
        *((one, f"{one.purpose}, in discovery") for one in chosen),
    ]:
        sizes = map(_size, (one.tensor_bytes, one.sent(budget.world)))
        rows.append([purpose, one.collective, *sizes])
    return _aligned(rows)


def _disk(budget: Budget, buffers: int) -> str:
    weights, keep = budget.element * budget.num_params + buffers, budget.config.run.keep_last
    state = budget.state_bytes()
    rows = {
        "checkpoint": f"{_size(weights + state)}: weights {_size(weights)}, state {_size(state)}; "
        f"run.keep_last={keep} and one being written: {_size((keep + 1) * (weights + state))}",
        "release": f"{_size(_RELEASED * budget.num_params + buffers)} in bf16",
    }
    if budget.config.mask.source == "earlybird":
        dense = weights + budget.state_bytes(dense=True)
        rows["checkpoint"] += f"\n{'':13}in discovery {_size(dense)} each"
    return "  on disk\n" + _in_lines(rows)


def _times(
    budget: Budget,
    machine: Machine,
    hf_config: PreTrainedConfig,
    block: int,
    recipes: Mapping[str, Recipe],
) -> str:
    d, world, train = budget.num_params, budget.world, budget.config.train
    parts = world if budget.stage == 3 and recipes else 1
    rate = _draw_rate(recipes)
    phases = 1 + (budget.config.mask.source == "earlybird")
    seconds = (phases * d / parts + d / world) / rate
    rows = {
        "theta(0)": f"{_duration(seconds)}: {rate / 1e6:,.0f} million elements per second and rank "
        f"on one core here; each rank draws {d / parts:,.0f} per phase, and checks {d / world:,.0f}"
    }
    flops = flops_per_token(hf_config, d, block)
    recomputed = flops / 3 if train.activation_checkpointing == "full" else 0.0
    tokens = train.global_batch_size * block
    total = (flops + recomputed) * tokens
    rows["compute"] = f"{flops:.3g} FLOP per token" + (
        f" and {recomputed:.3g} recomputed" if recomputed else ""
    )
    rows["compute"] += f", {total * train.steps:.3g} in all"
    if machine.device_flops:
        each = total / (machine.device_flops * machine.mfu * world)
        what = f"{machine.mfu:.0%} of {machine.device_flops / 1e12:,.0f} TFLOP/s per rank"
        rows["training"] = f"{_duration(each * train.steps)} at {what}, {each:.3g} s per update"
        if phases == 2:
            steps = budget.config.mask.max_steps
            rows["discovery"] = f"{_duration(each * steps)} at most, {steps:,} updates"
    return "  time\n" + _in_lines(rows)


def _draw_rate(recipes: Mapping[str, Recipe]) -> float:
    """Return the elements of theta(0) that this core draws per second."""
    largest = max(recipes.values(), key=lambda one: one.numel, default=None)
    draw = torch.empty(_SAMPLE).normal_
    count = _SAMPLE
    if largest is not None:
        count = min(_SAMPLE, largest.numel)
        draw = partial(largest.slice, Secret(bytes(32)), 0, count)  # of no run
        draw()
    begin = time.perf_counter()
    draw()
    return count / max(time.perf_counter() - begin, 1e-9)


def _fits(budget: Budget, timelines: Mapping[bool, Timeline | None], memory: int) -> str:
    found = fit.fits(budget, timelines, memory)
    rows = [[f"largest micro-batch in {USABLE:.0%} of {_size(memory)}"]]
    rows[0] += [way.title for way in fit.WAYS]
    for stage in range(4):
        sizes = (found[stage, way.title] for way in fit.WAYS)
        rows.append(
            [f"ZeRO {stage}", *("-" if n is None else str(n) if n else "none" for n in sizes)]
        )
    text = f"{_aligned(rows)}\n  {fit.LEGEND}\n"
    chosen = fit.best(found)
    if chosen is None:
        more = "take more ranks, shorter blocks, or offload_optimizer and offload_param"
        return f"{text}  nothing of this fits: {more}"
    stage, way = chosen
    how = "the settings as they are" if way == fit.WAYS[0].title else f"the change `{way}`"
    return f"{text}  smallest that fits: ZeRO {stage} with {how}, micro-batch {found[chosen]}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, the first column to the left and the others to the right."""
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join((f"  {name:<{first}}", *(f"{c:>{w}}" for c, w in zip(cells, rest, strict=True))))
        for name, *cells in rows
    )


def _in_lines(rows: Mapping[str, str]) -> str:
    """Return ``plan.in_lines`` with long lines broken."""
    lines = plan.in_lines(rows).split("\n")
    indent = " " * 13
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=indent) for line in lines)


def _unit(size: float) -> tuple[float, str]:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
    return next((unit for unit in units if size >= unit[0] / 10), (1.0, "B"))


def _size(num_bytes: float) -> str:
    unit, word = _unit(num_bytes)
    return f"{num_bytes / unit:,.2f} {word}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
