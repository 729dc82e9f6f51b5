"""The tables that a dry run prints."""

import textwrap
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from transformers import PreTrainedConfig

from pmp_ds.config import Config
from pmp_ds.engine.figures import flops_per_token
from pmp_ds.model.keys import Secret
from pmp_ds.model.parameters import ParamInfo
from pmp_ds.model.recipe import Recipe
from pmp_ds.state.shelf import most_at_once
from pmp_ds.train import fit, phases, plan, wire
from pmp_ds.train.activations import Timeline
from pmp_ds.train.budget import Budget, Bytes
from pmp_ds.train.machine import Machine
from pmp_ds.train.micro_batch import USABLE

_SAMPLE = 1 << 20  # elements drawn to measure the rate


def memory(budget: Budget, now: Timeline | None, machine: Machine, *, drawn_whole: bool) -> str:
    """Return the memory of every phase, on the device and in host memory."""
    device = phases.on_device(budget, now)
    host = {phase: phases.host(budget, phase, drawn_whole=drawn_whole) for phase in device}
    title = f"device memory of a rank, micro-batch {budget.cut.micro_batch_size}"
    return "\n\n".join(
        (
            _table(title, device, machine.device_memory),
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


def traffic(budget: Budget, table: Sequence[ParamInfo]) -> str:
    """Return what a rank sends in an update, by collective."""
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


def disk(budget: Budget, buffers: int) -> str:
    """Return the sizes of checkpoints and release; ``buffers``: bytes of the model's constants."""
    state, whole, run = budget.state_bytes(), budget.checkpoint(buffers), budget.config.run
    most = _most_checkpoints(budget.config)
    old = most - run.keep_last - 1
    kept = f"run.keep_last={run.keep_last}"
    if run.keep_every:
        kept += f", {old} more by run.keep_every={run.keep_every}"
    rows = {
        "checkpoint": f"{_size(whole)}: weights {_size(whole - state)}, state {_size(state)}",
        "at once": f"{_size(most * whole)} with {kept} and one being written",
    }
    if budget.config.mask.source == "earlybird":
        dense, most = (
            budget.checkpoint(buffers, dense=True),
            _most_checkpoints(budget.config, dense=True),
        )
        rows["discovery"] = f"{_size(dense)} for a checkpoint, {_size(most * dense)} at once"
    rows["release"] = f"{_size(budget.release(buffers))} in bf16"
    return "  on disk\n" + in_lines(rows)


def disk_bytes(budget: Budget, buffers: int) -> int:
    """Return the most bytes at once of what ``disk`` lists."""
    config = budget.config
    found = _most_checkpoints(config) * budget.checkpoint(buffers)
    if config.mask.source == "earlybird":
        found = max(
            found, _most_checkpoints(config, dense=True) * budget.checkpoint(buffers, dense=True)
        )
    return found + budget.release(buffers)


def _most_checkpoints(config: Config, *, dense: bool = False) -> int:
    """Return the most checkpoints at once; ``dense``: of discovery."""
    run = config.run
    # The last update of training has one, that of discovery ends in a ticket.
    updates = config.mask.max_steps - 1 if dense else config.train.steps + run.checkpoint_every - 1
    saves = updates // run.checkpoint_every
    return most_at_once(saves, run.checkpoint_every, run.keep_last, run.keep_every)


def times(
    budget: Budget,
    machine: Machine,
    hf_config: PreTrainedConfig,
    block: int,
    recipes: Mapping[str, Recipe],
) -> str:
    """Return the time of theta(0), measured on this core, and that of training at a stated rate;
    ``block`` in tokens."""
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
    return "  time\n" + in_lines(rows)


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


def fits(budget: Budget, timelines: Mapping[bool, Timeline | None], memory: int) -> str:
    """Return the micro-batches that fit into ``memory`` bytes, by stage and change."""
    found = fit.fits(budget, timelines, memory)
    rows = [[f"largest micro-batch in {USABLE:.0%} of {_size(memory)}"]]
    rows[0] += [way.title for way in fit.WAYS]
    for stage in range(4):
        sizes = (found[stage, way.title] for way in fit.WAYS)
        rows.append(
            [f"ZeRO {stage}", *("-" if n is None else str(n) if n else "none" for n in sizes)]
        )
    text = f"{_aligned(rows)}\n{fit.LEGEND}\n"
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


def in_lines(rows: Mapping[str, str]) -> str:
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
