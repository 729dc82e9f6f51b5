"""Prepare one store on several machines that share a file system, under any scheduler.

    plan(config)            once: tokenizer, engine, units; writes `<out>.incomplete/plan.json`
    pack(out, node, nodes)  on every node, at the same time: units node, node + nodes, ...
    finish(out)             once, when all units are there: the manifest, and the store's name

The result is that of ``prepare`` to the byte, whichever node packed what. Nodes do not talk to
each other: a shard and an entry of the ledger appear whole by a rename, so a node may be killed,
repeated, late, or the same twice.
"""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS
from pmp_ds.errors import UserError, quoted
from pmp_ds.foreign import MissingError, read_object
from pmp_ds.prepare.build import (
    complete_store,
    packing_job,
    ready_encoder,
    sample_texts,
)
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects, Unfinished, Unit, group_units
from pmp_ds.prepare.encoder import Encoder
from pmp_ds.prepare.prepare import ready_tokenizer, summarize
from pmp_ds.prepare.saved_tokenizer import about_saved
from pmp_ds.prepare.staging import (
    PLAN,
    Request,
    exists,
    held,
    matching_manifest,
    publish,
    read_identity,
    remove_leftovers,
    saved_tokenizer_files,
    staging,
    staging_folder,
)
from pmp_ds.prepare.summary import PrepareSummary
from pmp_ds.prepare.tokenizer import Tokenizer, load_trained
from pmp_ds.prepare.units import PackJob, UnitResult, finished_unit
from pmp_ds.prepare.workers import available_cores, pack_units
from pmp_ds.progress import Progress
from pmp_ds.run_dir import write_json

_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one call of ``pack`` did; ``str()`` is its closing report."""

    folder: Path
    packed: int
    """Units packed now."""

    units: int
    """Units of this node, the ones that were there included."""

    num_bytes: int
    """Input bytes of the units packed now."""

    def __str__(self) -> str:
        return (
            f"packed: {self.packed} units, {self.units - self.packed} of this node's {self.units} "
            f"were there: {self.folder}"
        )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """What a plan says, found again on this machine."""

    request: Request
    tokenizer: Tokenizer
    tokenizer_files: dict[str, str]
    warnings: list[str]
    encoder: Encoder
    job: PackJob
    units: list[Unit]


def plan(config: PrepareConfig) -> int:
    """Decide everything that the nodes have to agree on; return the number of units.

    The same settings again keep what is packed. 0: the store is complete already. Raises UserError
    as ``prepare`` does, and for an input that is a stream.
    """
    request = Request.of(config)
    if exists(request.out):
        matching_manifest(request.out, request.settings)
        return 0
    for source in request.sources:
        if source.kind == "stream":
            raise UserError(
                f"input {source.name} is a stream, which one process reads in order: download it "
                "and name its files, or prepare it on one machine"
            )
    try:
        with staging(request.out, request.identity) as folder:
            tokenizer, _ = ready_tokenizer(folder, request)
            sample = sample_texts(request.sources, config)
            encoder, warnings = ready_encoder(request, tokenizer, sample)
            job = packing_job(folder, request, tokenizer, encoder.spec)
            warnings += about_saved(tokenizer, folder / "tokenizer", sample, job.bos_id)
            write_json(
                folder / PLAN,
                {
                    "config": dataclasses.asdict(config),
                    "engine": job.encoder.engine,
                    "warnings": warnings,
                },
            )
    except OSError as error:
        raise UserError(f"out={config.out} cannot be written: {error}") from error
    return len(group_units(request.sources))


def pack(out: Path, node: int = 0, nodes: int = 1, workers: int | None = None) -> Share:
    """Pack the missing ones of every ``nodes``-th unit, from number ``node`` on.

    Needs a plan; any number of nodes may do it at once, and another time with another number.
    Raises UserError when this machine does not find what the plan was made for.
    """
    if not 0 <= node < nodes:
        raise UserError(f"node={node} must be from 0 to nodes - 1 = {nodes - 1}")
    if exists(out) and not staging_folder(out).exists():
        Store.open(out)
        return Share(folder=out, packed=0, units=0, num_bytes=0)
    planned = _read_plan(out)
    job, units = planned.job, planned.units[node::nodes]
    missing = [unit for unit in units if finished_unit(job, unit) is None]
    num_bytes = sum(unit.num_bytes for unit in missing)
    workers = workers or planned.request.config.workers or available_cores()
    try:
        with Progress(f"pack on node {node} of {nodes}", "B", num_bytes, scale=True) as bar:
            workers = max(1, min(workers, len(missing)))
            pack_units(job, planned.encoder, missing, workers, _ignore, bar.update)
    except OSError as error:
        raise Unfinished(f"{job.folder} cannot be written: {error}") from error
    return Share(folder=job.folder, packed=len(missing), units=len(units), num_bytes=num_bytes)


def finish(out: Path) -> PrepareSummary:
    """Check every unit, write the manifest and give the store its name; at once if that was done.

    Raises UserError that names the units still missing, or for bad rows as ``prepare`` does; what
    is packed stays.
    """
    if exists(out) and not staging_folder(out).exists():
        remove_leftovers(out)
        return summarize(out, Store.open(out).manifest, None, reused=True)
    planned = _read_plan(out)
    folder = planned.job.folder
    try:
        with held(out):
            manifest = complete_store(
                planned.job,
                _add_up(out, planned),
                planned.request,
                planned.tokenizer,
                planned.tokenizer_files,
                planned.warnings,
            )
            publish(folder, out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error
    return summarize(out, manifest, None, reused=False)


def _add_up(out: Path, planned: _Planned) -> UnitResult:
    """What all units gave together; one at a time in memory, for there may be 10,000."""
    job = planned.job
    total = UnitResult(
        unigrams=np.zeros((len(SPLITS), job.vocab_size), np.int64),
        rejects=Rejects(max_malformed=job.max_malformed),
    )
    missing = []
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing leaves the interpreter
        found = pool.map(functools.partial(finished_unit, job), planned.units)
        for unit, result in zip(planned.units, found, strict=True):
            if result is None:
                missing.append(str(unit.index))
            else:
                total.unigrams += result.unigrams
                total.add(result)
    if missing:
        more = "" if len(missing) <= _NAMED else f" and {len(missing) - _NAMED} more"
        raise Unfinished(
            f"{len(missing)} of {len(planned.units)} units are missing in {job.folder}: "
            f"{', '.join(missing[:_NAMED])}{more}; repeat the nodes that did not end, or pack all "
            f"that is missing here: pmp-ds prepare-data pack {quoted(out)}"
        )
    return total


def _read_plan(out: Path) -> _Planned:
    folder = staging_folder(out)
    try:
        planned = read_object(folder / PLAN)
        config = PrepareConfig(**planned["config"] | {"input": tuple(planned["config"]["input"])})
    except MissingError as error:
        raise UserError(
            f"{folder} holds no plan: run `pmp-ds prepare-data plan "
            f"--out {quoted(out)}` with all settings first, once, and wait for its end"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / PLAN} cannot be read ({error}); run plan again") from error
    request = Request.of(config)
    _check_same(folder, request)
    files = saved_tokenizer_files(folder)
    if files is None:
        raise UserError(f"{folder}/tokenizer is not as it was planned; run plan again")
    tokenizer = request.tokenizer or load_trained(folder / "tokenizer")
    encoder = tokenizer.encoder
    if encoder.spec.engine != planned["engine"]:
        encoder = encoder.without_fast()
    return _Planned(
        request=request,
        tokenizer=tokenizer,
        tokenizer_files=files,
        warnings=planned["warnings"],
        encoder=encoder,
        job=packing_job(folder, request, tokenizer, encoder.spec),
        units=group_units(request.sources),
    )


def _check_same(folder: Path, request: Request) -> None:
    """UserError unless this machine sees the files, settings and libraries of the plan."""
    there, here = read_identity(folder) or {}, json.loads(json.dumps(request.identity))
    if there == here:
        return
    words = {"inputs": "input files (names, sizes or dates)", "versions": "library versions"}
    found = [
        f"{words.get(key, key)} are {there.get(key)} in the plan and {here[key]} here"
        for key in here
        if there.get(key) != here[key]
    ]
    raise UserError(
        f"{folder} was planned for something else: {'; '.join(found)}; let every node see the same "
        "files and libraries, or run plan again"
    )


def _ignore(unit: Unit, result: UnitResult) -> None:
    """The ledger has it."""
