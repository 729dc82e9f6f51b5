"""Checkpoints in logical form: what a run needs to go on, at any number of ranks and ZeRO stage.

    private/checkpoints/update-00000500/      of masked pretraining; discover-XXXXXXXX of discovery
        manifest.json            format version, position, sha256 of every file and of itself
        weights/                 every parameter whole in the training dtype, and config.json
        state/rank-00000.safetensors   this rank's compact optimizer state (optim/logical_state.py)
        state/masks.safetensors  of discovery: the candidates that its next update compares with
    private/checkpoints/latest   name of the newest, for people; written last

A folder that has its name is complete: it is written as `*.incomplete` and renamed. No file holds
code: nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.run_dir import RunDir, fsync_dir, make_private, write_json, write_text
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.train.state_reader import MASKS_FILE, StateReader
from pmp_ds.train.weight_files import save_tensors, save_weights

if TYPE_CHECKING:  # export reads checkpoints without DeepSpeed
    from pmp_ds.train.engine import Engine

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
LATEST = "latest"
_SPARE_BYTES = 1 << 20  # for headers, configuration and manifest
Phase = Literal["discover", "train"]
_NAMES: dict[Phase, str] = {"discover": "discover", "train": "update"}

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Gather = Callable[[Any], list[Any]]  # a value of every rank, on every rank


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after ``step`` updates of a phase. The engine adds its ``counters``."""

    step: int
    consumed_samples: int
    ticket_id: str | None
    dataset_id: str
    val_loss: float | None  # newest one, nats per token
    phase: Phase = "train"
    counters: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    """What the phase itself remembers: running loss of the guard, IoU history of discovery."""

    @property
    def name(self) -> str:
        return f"{_NAMES[self.phase]}-{self.step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint."""

    position: Position
    hf_config: PretrainedConfig
    weights: Iterable[tuple[str, torch.Tensor]]
    state: Callable[[], Tensors] | None  # None: another rank writes the same
    more: Tensors
    masks: Tensors
    num_bytes: int  # that this rank will write


class NotWrittenError(UserError):
    """A checkpoint that could not be written; what was there is intact."""


def take(
    engine: "Engine", mask: ParamMask | None, position: Position, *, copy: bool, more: Tensors,
    masks: Tensors,
) -> Snapshot:  # fmt: skip
    """The content of a checkpoint, plus ``more`` state of this rank. Collective.

    With ``copy`` training may go on; else ``write`` must follow first, and is collective too.
    """
    weights: Iterable[tuple[str, torch.Tensor]] = engine.parameters()
    writes = dist.rank() == 0 or not engine.shards.replicated
    state = engine.local_state(mask) if writes else None
    full = Position(**vars(position) | {"counters": engine.counters()})
    num_bytes = sum(tensor.nbytes for tensor in more.values())
    num_bytes += engine.state_bytes if writes else 0
    if dist.rank() == 0:
        num_bytes += engine.weight_bytes + sum(bits.nbytes for bits in masks.values())
    if copy:
        weights = list(weights)
    return Snapshot(full, engine.hf_config, weights, state, more, masks, num_bytes)


def write(run: RunDir, snapshot: Snapshot, gather: Gather = dist.all_gather_object) -> None:
    """Write a checkpoint; it appears whole or not at all. Collective through ``gather``.

    Raises NotWrittenError on every rank when any rank could not write its part.
    """
    final = run.checkpoints / snapshot.position.name
    folder = final.with_name(final.name + ".incomplete")
    rank0 = dist.rank() == 0
    try:
        total = sum(gather(snapshot.num_bytes))
        _together(gather, lambda: _create(folder, total) if rank0 else None)
        parts = _together(gather, lambda: _write_part(folder, snapshot))
        files = {name: digest for part in parts for name, digest in part.items()}
        _together(gather, lambda: _publish(folder, final, snapshot, files) if rank0 else None)
    except NotWrittenError as error:
        if rank0:
            shutil.rmtree(folder, ignore_errors=True)
        raise NotWrittenError(
            f"the checkpoint {final.name} was not written: {error}; the one before is intact. "
            f"Make room at {run.checkpoints}"
        ) from None


def save(run: RunDir, engine: "Engine", mask: ParamMask | None, position: Position) -> None:
    """``take`` and ``write`` at once, with a parameter or a file's share in memory. Collective."""
    write(run, take(engine, mask, position, copy=False, more={}, masks={}))


def _together(gather: Gather, action: Callable[[], T]) -> list[T]:
    """``action`` on every rank; its results, or NotWrittenError everywhere if one rank failed."""
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        problem = f"rank {dist.rank()}: {error}"
    outcomes: list[tuple[Any, str | None]] = gather((result, problem))
    problems = [text for _, text in outcomes if text]
    if problems:
        raise NotWrittenError("; ".join(problems))
    return [value for value, _ in outcomes]


def _create(folder: Path, num_bytes: int) -> None:
    """Raises OSError before a byte is written when the disk has no room for all of them."""
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes + _SPARE_BYTES:
        raise OSError(f"it needs {num_bytes / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")
    for part in (folder, folder / "weights", folder / "state"):
        make_private(part)


def _write_part(folder: Path, snapshot: Snapshot) -> dict[str, str]:
    """This rank's files; their sha256 by name."""
    written = []
    save_weights(snapshot.weights, snapshot.hf_config, folder / "weights")
    if snapshot.state is not None:
        written.append(folder / "state" / f"rank-{dist.rank():05d}.safetensors")
        save_tensors(snapshot.state() | snapshot.more, written[-1])
    if dist.rank() == 0:
        written += sorted((folder / "weights").iterdir())
        if snapshot.masks:
            written.append(folder / MASKS_FILE)
            save_tensors(snapshot.masks, written[-1])
    return {str(path.relative_to(folder)): _sha256(path) for path in written}


def mend(run: RunDir) -> None:
    """Name the newest one again, where a process was killed between a checkpoint and its name."""
    names = [folder.name for phase in _NAMES for folder in _folders(run, phase)]
    newest = max(names, default=None)  # `update` sorts after `discover`
    latest = run.checkpoints / LATEST
    if newest is not None and (not latest.exists() or latest.read_text() != newest + "\n"):
        write_text(latest, newest + "\n", private=True)


def _publish(folder: Path, final: Path, snapshot: Snapshot, files: dict[str, str]) -> None:
    content = asdict(snapshot.position) | {"format_version": FORMAT_VERSION, "files": files}
    manifest = content | {"sha256": _manifest_digest(content)}
    write_json(folder / MANIFEST_FILE, manifest, private=True)
    for part in (folder / "weights", folder / "state"):
        fsync_dir(part)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder, final)
    fsync_dir(final.parent)
    write_text(final.with_name(LATEST), final.name + "\n", private=True)


def _manifest_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prune(run: RunDir, phase: Phase, keep_last: int, keep_every: int = 0) -> None:
    """Delete a phase's checkpoints but the newest ``keep_last`` and those of every
    ``keep_every``-th update."""
    folders = _folders(run, phase)
    for folder in folders[keep_last:]:
        if not keep_every or _step(folder) % keep_every:
            # Killed in the middle, it must not look like a checkpoint.
            shutil.rmtree(folder.replace(folder.with_name(folder.name + ".incomplete")))
    if not folders[:keep_last]:
        (run.checkpoints / LATEST).unlink(missing_ok=True)


def find(
    run: RunDir, step: int | None = None, phase: Phase = "train", part: str = ""
) -> tuple[Path, Position] | None:
    """The newest intact checkpoint of a phase, or that of update ``step``; every file whose name
    starts with ``part`` is hashed.

    A damaged one is named and passed over, unless it was asked for by ``step``: then, and when it
    does not exist, UserError.
    """
    folders = _folders(run, phase)
    for folder in folders:
        if step is not None and _step(folder) != step:
            continue
        try:
            return folder, _verified(folder, part)
        except UserError as error:
            if step is not None:
                raise
            print(f"warning: {error}; trying the one before it", flush=True)
    if step is not None:
        have = ", ".join(str(_step(folder)) for folder in folders) or "none"
        raise UserError(f"{run.root} has no checkpoint of update {step}; it has: {have}")
    return None


def _folders(run: RunDir, phase: Phase) -> list[Path]:
    """Complete checkpoints, newest first."""
    complete = run.checkpoints.glob(f"{_NAMES[phase]}-????????/{MANIFEST_FILE}")
    return sorted((path.parent for path in complete), reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _verified(folder: Path, part: str) -> Position:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"checkpoint {folder} has a format that this version does not read")
        if manifest.pop("sha256") != _manifest_digest(manifest):
            raise UserError(f"checkpoint {folder} is damaged: {MANIFEST_FILE}")
        files = manifest.pop("files")
        there = {str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file()}
        for name in sorted(there - {*files, MANIFEST_FILE}):  # readers look at all that is there
            raise UserError(
                f"checkpoint {folder} is damaged: it has {name}, which its manifest does not list"
            )
        for name, digest in files.items():
            if not name.startswith(part):
                continue
            if not (folder / name).exists() or _sha256(folder / name) != digest:
                raise UserError(f"checkpoint {folder} is damaged: {name}")
        manifest.pop("format_version")
        position = Position(**manifest)
    except (
        json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError
    ) as error:  # fmt: skip
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST_FILE} ({error})") from None
    if position.name != folder.name:
        raise UserError(f"checkpoint {folder} is damaged: it holds {position.name}")
    return position


def load_state(
    folder: Path, engine: "Engine", mask: ParamMask | None, position: Position
) -> StateReader:
    """Bring an engine, built from the checkpoint's weights and armed with ``mask``, to
    ``position``: moments, fp32 master weights, counters. Any world size and ZeRO stage."""
    reader = StateReader(folder)
    engine.restore(mask, reader.read, position.step, position.counters)
    return reader


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
