"""Checkpoints in logical form: what a run needs to go on, at any number of ranks and ZeRO stage.

    private/checkpoints/update-00000500/
        manifest.json            format version, position, sha256 of every file; written last
        weights/                 every parameter whole in the training dtype, and config.json
        state/rank-00000.safetensors   this rank's compact optimizer state (optim/logical_state.py)

A folder that has its name is complete: it is written as `*.incomplete` and renamed. No file holds
code: nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.run_dir import RunDir, fsync_dir, make_private, write_json
from pmp_ds.ticket.mask import ParamMask

if TYPE_CHECKING:  # export reads checkpoints without DeepSpeed
    from pmp_ds.train.engine import Engine

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after ``step`` updates. The engine adds its ``counters``."""

    step: int
    consumed_samples: int
    ticket_id: str | None
    dataset_id: str
    val_loss: float | None  # newest one, nats per token
    counters: dict[str, float] = field(default_factory=dict)


def save(run: RunDir, engine: "Engine", mask: ParamMask | None, position: Position) -> None:
    """Write a checkpoint; it appears whole or not at all. Collective."""
    final = run.checkpoints / f"update-{position.step:08d}"
    folder = final.with_name(final.name + ".incomplete")
    if dist.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        for part in (folder, folder / "weights", folder / "state"):
            make_private(part)
    dist.barrier()
    save_weights(engine.parameters(), engine.hf_config, folder / "weights")
    if dist.rank() == 0 or not engine.shards.replicated:
        name = f"rank-{dist.rank():05d}.safetensors"
        _save_file(engine.local_state(mask), folder / "state" / name)
    dist.barrier()
    if dist.rank() == 0:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = asdict(position) | {
            "format_version": FORMAT_VERSION,
            "counters": engine.counters(),
            "files": {str(path.relative_to(folder)): _sha256(path) for path in files},
        }
        write_json(folder / MANIFEST_FILE, manifest, private=True)
        for part in (folder / "weights", folder / "state"):
            fsync_dir(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        fsync_dir(final.parent)
    dist.barrier()


def prune(run: RunDir, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints."""
    for folder in _folders(run)[keep_last:]:
        shutil.rmtree(folder)


def find(run: RunDir, step: int | None = None) -> tuple[Path, Position] | None:
    """The newest intact checkpoint, or that of update ``step``; every file is hashed.

    A damaged one is named and passed over, unless it was asked for by ``step``: then, and when it
    does not exist, UserError.
    """
    for folder in _folders(run):
        if step is not None and folder.name != f"update-{step:08d}":
            continue
        try:
            return folder, _verified(folder)
        except UserError as error:
            if step is not None:
                raise
            print(f"warning: {error}; trying the one before it", flush=True)
    if step is not None:
        have = ", ".join(str(int(f.name.split("-")[1])) for f in _folders(run)) or "none"
        raise UserError(f"{run.root} has no checkpoint of update {step}; it has: {have}")
    return None


def _folders(run: RunDir) -> list[Path]:
    """Complete checkpoints, newest first."""
    complete = run.checkpoints.glob(f"update-????????/{MANIFEST_FILE}")
    return sorted((path.parent for path in complete), reverse=True)


def _verified(folder: Path) -> Position:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if manifest.pop("format_version") != FORMAT_VERSION:
            raise UserError(f"checkpoint {folder} has a format that this version does not read")
        for name, digest in manifest.pop("files").items():
            if not (folder / name).exists() or _sha256(folder / name) != digest:
                raise UserError(f"checkpoint {folder} is damaged: {name}")
        return Position(**manifest)
    except (
        json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError
    ) as error:  # fmt: skip
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST_FILE} ({error})") from None


def load_state(folder: Path, engine: "Engine", mask: ParamMask | None, position: Position) -> None:
    """Bring an engine, built from the checkpoint's weights and armed with ``mask``, to
    ``position``: moments, fp32 master weights, counters. Any world size and ZeRO stage."""
    read = _StateReader(folder / "state").read
    engine.restore(mask, read, position.step, position.counters)


class _StateReader:
    """Reads runs of kept elements from the state files of all ranks that wrote them."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob("rank-*"))]
        self._parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor, first = key.rsplit("/", 1)
                self._parts[tensor].append((int(first), number))
        for parts in self._parts.values():
            parts.sort()

    def read(self, kind: str, name: str, first: int, count: int) -> torch.Tensor:
        """(count,) fp32: kept elements [first, first + count) of parameter ``name``."""
        parts = self._parts[f"{kind}/{name}"]
        pieces = []
        while count:
            start, number = parts[bisect_right(parts, first, key=lambda part: part[0]) - 1]
            stored = self._files[number].get_slice(f"{kind}/{name}/{start}")
            piece = stored[first - start : first - start + count]
            assert piece.numel(), f"{kind} of {name} ends before element {first}"
            pieces.append(piece)
            first, count = first + piece.numel(), count - piece.numel()
        return torch.cat(pieces) if pieces else torch.empty(0)


def save_weights(
    parameters: Iterable[tuple[str, torch.Tensor]], hf_config: PretrainedConfig, folder: Path
) -> None:
    """Write whole parameters as Hugging Face safetensors, with at most one file's share in memory.
    Every rank consumes ``parameters``; rank 0 writes."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        _save_file(pending, folder / f"part-{len(shards)}")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in parameters:
        if dist.rank() == 0:
            if pending and size + tensor.nbytes > SHARD_BYTES:
                flush()
                size = 0
            pending[name] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
    if dist.rank() != 0:
        return
    flush()
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        part = "" if count == 1 else f"-{i + 1:05d}-of-{count:05d}"
        file = f"model{part}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index, private=True)
    write_json(folder / "config.json", hf_config.to_dict(), private=True)


def read_weights(folder: Path) -> Callable[[str], torch.Tensor]:
    """A function from a parameter's name to its tensor in a ``weights/`` folder."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - not a dict
    return lambda name: where[name].get_tensor(name)


@torch.no_grad()
def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Fill a model's parameters from a ``weights/`` folder, cast to the model's dtype."""
    stored = read_weights(folder)
    for name, param in model.named_parameters():
        param.copy_(stored(name))


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """safetensors, 0600 from the first byte, fsynced."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    save_file(tensors, path)
    path.chmod(0o600)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
