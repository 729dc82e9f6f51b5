"""Checkpoints in logical form: a run can resume at any number of ranks and ZeRO stage.

    private/checkpoints/update-00000500/      in masked pretraining; discover-XXXXXXXX in discovery
        manifest.json            format version, position, sha256 of every file and of itself
        weights/                 every whole parameter in the training dtype, persistent buffers in
                                 their own, and config.json; every rank writes its share of files
        state/rank-00000.safetensors   this rank's compact optimizer state (optim/logical_state.py),
                                 and in discovery its share of scores and candidate masks
    private/checkpoints/latest   name of the newest, for people; written last

A folder with such a name is complete: it is written as `*.incomplete`, renamed and read back. No
file contains code: nothing is unpickled. shelf.py finds and deletes checkpoints.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from pmp_ds import dist, lease
from pmp_ds.errors import UserError
from pmp_ds.formats import FormatError
from pmp_ds.run_dir import RunDir, fsync_dir, make_private, sha256
from pmp_ds.state import shelf
from pmp_ds.state.manifest import DamagedError, Position, listed, verified, write_manifest
from pmp_ds.state.state_reader import StateReader
from pmp_ds.state.weight_files import Layout, save_tensors, save_weights

if TYPE_CHECKING:  # export reads checkpoints without DeepSpeed
    from pmp_ds.engine.engine import Engine
    from pmp_ds.engine.portable import Portable

_SPARE_BYTES = 1 << 20  # for headers, configuration and manifest

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Gather = Callable[[Any], list[Any]]  # gathers a value of each rank on every rank


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint."""

    position: Position
    hf_config: PretrainedConfig | None
    layout: Layout
    weights: Iterable[tuple[str, torch.Tensor]]
    state: Callable[[], Tensors] | None  # None: another rank writes the same
    more: Tensors
    num_bytes: int  # bytes that this rank will write


class NotWrittenError(UserError):
    """A checkpoint could not be written; existing ones are intact."""


def take(engine: "Portable", position: Position, *, copy: bool, more: Tensors) -> Snapshot:
    """Take the content of a checkpoint, plus ``more`` state of this rank; without ZeRO that of rank
    0. Collective.

    With ``copy`` training may continue at once; otherwise ``write``, then also collective, must
    follow first.
    """
    sizes = engine.weight_sizes()
    layout = Layout.of(sizes, dist.world_size())
    mine = layout.names_of(dist.rank())
    weights: Iterable[tuple[str, torch.Tensor]] = chain(engine.parameters(mine), engine.constants())
    writes = dist.rank() == 0 or not engine.shards.replicated
    state, more = (engine.local_state(), more) if writes else (None, {})
    # The phase keeps changing its memory while a thread writes.
    full = replace(position, counters=engine.counters(), memory=deepcopy(position.memory))
    num_bytes = sum(tensor.nbytes for tensor in more.values())
    num_bytes += engine.state_bytes if writes else 0
    num_bytes += sum(size for name, size in sizes.items() if name in mine)
    if copy:
        weights = list(weights)
    return Snapshot(full, engine.hf_config, layout, weights, state, more, num_bytes)


def write(run: RunDir, snapshot: Snapshot, gather: Gather = dist.all_gather_object) -> None:
    """Write a checkpoint and read it back; it appears whole or not at all. Collective through
    ``gather``.

    Raises NotWrittenError on every rank when any rank cannot write its part, or reads back
    different bytes.
    """
    final = run.checkpoints / snapshot.position.name
    folder = final.with_name(final.name + ".incomplete")
    rank0, published = dist.rank() == 0, False
    try:
        total = sum(gather(snapshot.num_bytes))
        lease.confirm(run.root)
        _together(gather, lambda: _create(folder, total) if rank0 else None)
        parts = _together(gather, lambda: _write_part(folder, snapshot))
        files = {name: digest for part in parts for name, digest in part.items()}
        lease.confirm(run.root)
        _together(gather, lambda: _publish(folder, final, snapshot, files) if rank0 else None)
        published = True
        mine = parts[dist.rank()]
        _together(gather, lambda: _confirm(final, mine, files if rank0 else None))
    except NotWrittenError as error:
        if rank0:
            shutil.rmtree(folder, ignore_errors=True)
            if published:
                with contextlib.suppress(OSError):
                    shelf.set_aside(final)
        way_out = "It is set aside; check the disk of" if published else "Make room at"
        raise NotWrittenError(
            f"the checkpoint {final.name} was not written: {error}; the one before is intact. "
            f"{way_out} {run.checkpoints}"
        ) from None
    if rank0:
        shelf.mend(run)


def save(run: RunDir, engine: "Portable", position: Position) -> None:
    """Call ``take`` and ``write`` with one parameter or file part in memory. Collective."""
    write(run, take(engine, position, copy=False, more={}))


def _together(gather: Gather, action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank and return all results. Raises NotWrittenError on every rank if
    one rank fails."""
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except (OSError, SafetensorError, DamagedError, FormatError) as error:
        problem = f"rank {dist.rank()}: {error}"
    outcomes: list[tuple[Any, str | None]] = gather((result, problem))
    problems = [text for _, text in outcomes if text]
    if problems:
        raise NotWrittenError("; ".join(problems))
    return [value for value, _ in outcomes]


def _create(folder: Path, num_bytes: int) -> None:
    """Create the folders. Raises OSError first if the disk has no room for ``num_bytes``."""
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes + _SPARE_BYTES:
        raise OSError(f"it needs {num_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free")
    for part in (folder, folder / "weights", folder / "state"):
        make_private(part)


def _write_part(folder: Path, snapshot: Snapshot) -> dict[str, str]:
    """Write this rank's files; return their sha256 by name."""
    rank, parts = dist.rank(), folder / "weights"
    written = save_weights(snapshot.weights, snapshot.layout, snapshot.hf_config, parts, rank)
    if snapshot.state is not None:
        path = folder / "state" / f"rank-{rank:05d}.safetensors"
        written[path] = save_tensors(snapshot.state() | snapshot.more, path)
    return {str(path.relative_to(folder)): digest for path, digest in written.items()}


def _publish(folder: Path, final: Path, snapshot: Snapshot, files: dict[str, str]) -> None:
    """Rename a complete folder to its final name. A readable checkpoint there is not replaced."""
    write_manifest(folder, snapshot.position, files)
    for part in (folder / "weights", folder / "state"):
        fsync_dir(part)
    if final.exists():
        try:
            verified(final)
        except DamagedError:
            shelf.set_aside(final)
        else:
            raise FileExistsError(f"{final} already exists and is intact: move it elsewhere")
    os.replace(folder, final)
    fsync_dir(final.parent)


def _confirm(final: Path, mine: dict[str, str], files: dict[str, str] | None) -> None:
    """Read this rank's files again under their final name. Rank 0, which passes all ``files``, also
    reads the manifest. Raises DamagedError when something differs from what was written."""
    for name, digest in mine.items():
        if sha256(final / name) != digest:
            raise DamagedError(final, f"{name} differs from what was written")
    if files is not None:
        _, there = listed(final)
        missing = [name for name in files if not (final / name).is_file()]
        if there != files or missing:
            name = [*missing, "manifest.json"][0]
            raise DamagedError(final, f"{name} differs from what was written")


def load_state(folder: Path, engine: "Engine", position: Position) -> StateReader:
    """Restore ``position`` in an engine that has the checkpoint's weights and mask: moments, fp32
    master weights, counters. Any world size and ZeRO stage."""
    reader = StateReader(folder)
    engine.restore(reader.kinds, reader.read, position.step, position.counters)
    return reader
