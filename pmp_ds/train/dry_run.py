"""The plan of a run that is not started: memory, traffic, disk, time, and what fits.

    print(describe(config, ds_config, Machine(world=8, device_memory=80 * 10**9)))

Nothing is drawn, trained or written; no process group, GPU or data is needed.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds.config import Config
from pmp_ds.config.precision import precision_of
from pmp_ds.data.mixed_store import open_data
from pmp_ds.engine.deepspeed_config import merge
from pmp_ds.errors import require
from pmp_ds.foreign import read_object
from pmp_ds.model.build import UNBOUNDED, context_length, model_config
from pmp_ds.model.parameters import ParamInfo, constants, num_params, parameter_table
from pmp_ds.model.recipe import NotDescribedError, Recipe
from pmp_ds.model.recipe import describe as describe_model
from pmp_ds.train import dry_tables, fit, plan
from pmp_ds.train.activations import Timeline, timeline
from pmp_ds.train.budget import Budget
from pmp_ds.train.machine import Machine

_VOCABULARY = {"llama": 32_000, "gpt2": 50_257}


def describe(config: Config, ds_config: dict[str, Any], machine: Machine) -> str:
    """Return the plan as text. Raises UserError for settings that do not go together."""
    found, assumed = _shape(config, ds_config, machine)
    budget, hf_config, block, table = found.budget, found.hf_config, found.block, found.table
    recipes, reason, buffers = found.recipes, found.reason, found.buffers
    full = config.train.activation_checkpointing == "full"
    kinds = (False, True) if machine.device_memory else (full,)
    found_timelines, unknown = timelines(found, kinds, "cuda")
    now = found_timelines[full]
    if config.train.micro_batch_size == "auto":
        memory = machine.device_memory if now else None
        size = fit.largest(budget, now, memory) if memory else 1
        budget = fit.with_micro_batch(budget, max(size, 1))
        how = "what fits" if memory else "1; --device-memory says what fits"
        assumed = "; ".join(filter(None, (assumed, f"train.micro_batch_size=auto: {how}")))
    rows = plan.basics(budget, block, "a GPU each")
    if assumed:
        rows["assumed"] = assumed
    if unknown:
        rows["unknown"] = unknown
    parts = [
        f"{config.run.name}: a dry run; nothing is trained or written",
        dry_tables.in_lines(rows),
        dry_tables.memory(budget, now, machine, drawn_whole=reason is not None),
        dry_tables.traffic(budget, table),
        dry_tables.disk(budget, buffers),
        dry_tables.times(budget, machine, hf_config, block, recipes),
    ]
    if machine.device_memory and not unknown:
        parts.append(dry_tables.fits(budget, found_timelines, machine.device_memory))
    return "\n\n".join(parts)


def disk_bytes(config: Config, ds_config: dict[str, Any], world: int) -> int:
    """Return the most bytes that a run of ``world`` ranks has on disk: checkpoints, the one being
    written, and the release. Raises UserError for settings that do not go together."""
    found, _ = _shape(config, ds_config, Machine(world=world))
    return dry_tables.disk_bytes(found.budget, found.buffers)


@dataclass(frozen=True)
class Shape:
    """What a run is, without any value."""

    budget: Budget
    hf_config: PreTrainedConfig
    block: int  # tokens
    table: tuple[ParamInfo, ...]
    recipes: dict[str, Recipe]
    reason: str | None  # why there are no recipes
    buffers: int  # bytes of constants


def _shape(config: Config, ds_config: dict[str, Any], machine: Machine) -> tuple[Shape, str]:
    """Return the shape of a run, and what was assumed, in words, where there is no store."""
    merge(ds_config, config.train, machine.world)
    vocabulary, block, eos, assumed = _data(config, machine.block_size)
    hf_config = model_config(
        config.model,
        vocab_size=vocabulary,
        eos_id=eos,
        bos_id=None,
        block_size=block,
        base=_base(config),
    )
    given = config.mask.file
    ticket = Path(given) if given is not None and Path(given).exists() else None
    return shape_of(config, ds_config, machine.world, hf_config, block, ticket), assumed


def shape_of(
    config: Config,
    ds_config: dict[str, Any],
    world: int,
    hf_config: PreTrainedConfig,
    block: int,
    ticket: Path | None,
    *,
    on_cpu: bool = False,
) -> Shape:
    """Return the shape of a run of ``world`` ranks whose settings go together, with blocks of
    ``block`` tokens; ``ticket``: the folder of ``mask.source: file``."""
    model, recipes, reason = _skeleton(hf_config)
    constant = {n: recipes[n].constant if n in recipes else False for n in _names(model)}
    table = parameter_table(model, constant)
    shapes = {info.name: info.shape for info in table}
    if config.init.seed is not None:
        recipes, reason = {}, "init.seed draws from one sequence of numbers"
    kept = plan.kept_of(config, num_params(table), ticket)
    budget = Budget(shapes, kept, config, ds_config, world, on_cpu)
    buffers = sum(buffer.nbytes for buffer in constants(model).values())
    return Shape(budget, hf_config, block, table, recipes, reason, buffers)


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
        path = Path(model.path or config.init.weights or "")
        where = str(path / "config.json" if path.is_dir() else path)
        values = read_object(Path(where)) if Path(where).is_file() else {"vocab_size": 1}
        vocabulary = int(values.get("vocab_size", 1))
    elif model.vocab_size is None:
        where = f"{model.family}'s own; model.vocab_size"
    longest = model.max_positions
    if model.family == "auto" and block_size is None:
        sizes = {"vocab_size": vocabulary, "eos_id": 0, "block_size": 1}
        found = model_config(model, **sizes, bos_id=None, base=_base(config))
        longest = context_length(found)
        require(longest < UNBOUNDED, f"{where} names no longest context: add --block-size N")
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


def _base(config: Config) -> Path | None:
    return None if config.init.weights is None else Path(config.init.weights)


def _names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def timelines(
    shape: Shape, kinds: tuple[bool, ...], device: str
) -> tuple[dict[bool, Timeline | None], str | None]:
    """Return the timelines of these ``kinds``, with recomputation of everything or without, on
    `cuda` or `cpu`, and why there are none."""
    hf_config, budget = shape.hf_config, shape.budget
    dtype = precision_of(budget.config.train).dtype
    found: dict[bool, Timeline | None] = {}
    reason = None
    for recompute in kinds:
        train = fit.recomputing(budget.config.train, everything=recompute)
        try:
            model = _skeleton(hf_config)[0]
            found[recompute] = timeline(model, train, shape.block, dtype, device)
        except Exception as error:  # noqa: BLE001 - whatever a model of any family does
            found[recompute] = None
            why = str(error).partition("\n")[0]
            reason = f"activations, which are not counted ({hf_config.model_type}: {why})"
    return found, reason
