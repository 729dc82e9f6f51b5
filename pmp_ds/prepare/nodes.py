"""The steps of a preparation, on one machine or several that share a file system.

    plan(config)            once: tokenizer, engine, units; writes `<out>.incomplete/plan.json`
    pack(out, node, nodes)  on every node, at the same time: units node, node + nodes, ...
    finish(out)             once, after all units: the manifest, and the store's name

The store is the same to the byte, whichever node packed which unit. Nodes do not communicate:
shards and ledger entries appear whole by renaming, so a node may be killed, repeated, late or
started twice.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError
from pmp_ds.prepare.complete import complete_store
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Unfinished, Unit, group_units
from pmp_ds.prepare.planning import make_plan, read_plan, write_plan
from pmp_ds.prepare.request import Request
from pmp_ds.prepare.staging import (
    exists,
    held,
    matching_manifest,
    publish,
    remove_leftovers,
    staging,
    staging_folder,
    writing,
)
from pmp_ds.prepare.summary import PrepareSummary
from pmp_ds.prepare.units import PackJob, UnitResult, finished_unit
from pmp_ds.prepare.workers import available_cores, pack_units
from pmp_ds.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Share:
    """The work of one ``pack`` call; ``str()`` is its closing report."""

    folder: Path
    packed: int
    """Units packed by this call."""

    units: int
    """Units of this node, including those that were finished before."""

    num_bytes: int
    """Input bytes of the units packed by this call."""

    def __str__(self) -> str:
        return (
            f"packed: {self.packed} units, {self.units - self.packed} of this node's {self.units} "
            f"were there: {self.folder}"
        )


def plan(config: PrepareConfig) -> int:
    """Decide everything that the nodes must agree on; return the number of units.

    With unchanged settings, packed units stay; 0 means that the store is complete. Raises UserError
    as ``prepare`` does, and for an input that is a stream.
    """
    request = Request.of(config)
    if exists(request.out):
        matching_manifest(request.out, request.settings)
        return 0
    if (stream := request.stream) is not None:
        raise UserError(
            f"input {stream.name} is a stream, which one process must read in order: download it "
            "and name its files, or prepare it on one machine"
        )
    with writing(request.out), staging(request.out, request.identity) as folder:
        write_plan(make_plan(folder, request), request)
    return len(group_units(request.sources))


def pack(out: Path, node: int = 0, nodes: int = 1, workers: int | None = None) -> Share:
    """Pack the missing ones of every ``nodes``-th unit, starting at number ``node``.

    Requires a plan. Any number of nodes may run at once, and a later call may use another number.
    Raises UserError when this machine does not match the plan.
    """
    if not 0 <= node < nodes:
        raise UserError(f"node={node} must be from 0 to nodes - 1 = {nodes - 1}")
    if exists(out) and not staging_folder(out).exists():
        Store.open(out)
        return Share(folder=out, packed=0, units=0, num_bytes=0)
    job, units = read_plan(out)
    mine = units[node::nodes]
    try:
        _, packed = pack_missing(job, mine, f"pack on node {node} of {nodes}", workers)
    except OSError as error:
        raise Unfinished(f"{job.folder} cannot be written: {error}") from error
    num_bytes = sum(unit.num_bytes for unit in packed)
    return Share(folder=job.folder, packed=len(packed), units=len(mine), num_bytes=num_bytes)


def finish(out: Path) -> PrepareSummary:
    """Check every unit, write the manifest and name the store; returns at once if this is done.

    Raises UserError that names missing units, or for bad rows as ``prepare`` does; packed units
    stay.
    """
    if exists(out) and not staging_folder(out).exists():
        remove_leftovers(out)
        return PrepareSummary(folder=out, reused=True, manifest=Store.open(out).manifest)
    job, units = read_plan(out)
    with writing(out), held(out):
        manifest = complete_store(job, units)
        publish(job.folder, out)
    return PrepareSummary(folder=out, reused=False, manifest=manifest)


def pack_missing(
    job: PackJob, units: Iterable[Unit], title: str, workers: int | None = None
) -> tuple[list[Unit], list[Unit]]:
    """Pack those of ``units`` that are not in the ledger; return all, and those packed now.

    ``workers``: None means as planned, or one per core. ``title`` heads the progress, which is
    complete if ``units`` is a list.
    """
    workers = workers or job.config.workers or available_cores()
    total = None
    if isinstance(units, list):
        workers, total = min(workers, len(units)), sum(unit.num_bytes for unit in units)
    seen: list[Unit] = []
    packed: list[Unit] = []
    documents = 0
    with Progress(title, "B", total, scale=True) as bar:

        def on_done(unit: Unit, result: UnitResult) -> None:
            nonlocal documents
            documents += sum(result.documents.values())
            bar.set(documents=documents)
            if unit.spooled:
                unit.sources[0].path.unlink()

        def missing() -> Iterator[Unit]:
            for unit in units:
                seen.append(unit)
                result = finished_unit(job, unit)
                if result is None:
                    packed.append(unit)
                    yield unit
                else:
                    on_done(unit, result)
                    bar.update(unit.num_bytes)

        pack_units(job, missing(), max(workers, 1), on_done, bar.update)
    return seen, packed
