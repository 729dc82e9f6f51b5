"""The manifest of a checkpoint: the run's position, the sha256 of every file and of itself.

Manifests may be written by any pmp-ds whose format docs/FORMATS.md lists as readable.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pmp_ds import formats
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import read_object
from pmp_ds.formats import FormatError
from pmp_ds.progress import Progress
from pmp_ds.run_dir import sha256, write_json
from pmp_ds.version import code_version

MANIFEST_FILE = "manifest.json"
Phase = Literal["discover", "train"]
NAMES: dict[Phase, str] = {"discover": "discover", "train": "update"}
_SHOW_PROGRESS = 1 << 30  # minimum bytes: a second of hashing
# Exceptions from reading a damaged manifest.
_DAMAGE = (KeyError, TypeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Position:
    """A run's position after ``step`` updates of a phase. The engine adds its ``counters``."""

    step: int
    consumed_samples: int
    ticket_id: str | None
    dataset_id: str
    val_loss: float | None  # newest one, nats per token
    phase: Phase = "train"
    counters: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    """The phase's own state, such as the guard's running loss or discovery's IoU history."""

    @property
    def name(self) -> str:
        return f"{NAMES[self.phase]}-{self.step:08d}"


class DamagedError(UserError):
    """A checkpoint is torn, changed or incomplete. ``reason`` does not name the checkpoint."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder} is damaged: {reason}")
        self.reason = reason


def write_manifest(folder: Path, position: Position, files: dict[str, str]) -> None:
    """Write the manifest of ``files`` (sha256 by name), which makes ``folder`` a checkpoint."""
    content = asdict(position) | {
        "code": str(code_version()),
        "files": files,
        "format_version": formats.current("checkpoint"),
    }
    manifest = content | {"sha256": _digest(content)}
    write_json(folder / MANIFEST_FILE, manifest, private=True)


def listed(folder: Path) -> tuple[Position, dict[str, str]]:
    """Return position and files from an intact manifest, without reading those files.

    Raises DamagedError, or FormatError for a version that this pmp-ds cannot read.
    """
    try:
        manifest = read_object(folder / MANIFEST_FILE)
        formats.require(
            "checkpoint",
            folder,
            manifest["format_version"],
            writer=manifest.get("code"),
            way_out="continue with that version, or move the folder elsewhere",
        )
        if manifest.pop("sha256") != _digest(manifest):
            raise DamagedError(folder, MANIFEST_FILE)
        files = dict(manifest["files"].items())
        known = {one.name for one in fields(Position)}
        values = {name: value for name, value in manifest.items() if name in known}
        position: Position = fit(Position, values, MANIFEST_FILE)
        name = position.name
    except (DamagedError, FormatError):
        raise
    except UserError as error:
        raise DamagedError(folder, str(error).removeprefix(f"{folder}/")) from None
    except _DAMAGE as error:
        raise DamagedError(folder, f"{MANIFEST_FILE} ({error})") from None
    if name != folder.name:
        raise DamagedError(folder, f"it contains {name}")
    return position, files


def verified(folder: Path, part: str = "") -> Position:
    """Return the position of an intact checkpoint, after hashing every file whose name starts with
    ``part``. Raises like ``listed``."""
    position, files = listed(folder)
    try:
        there = {str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file()}
        for name in sorted(there - {*files, MANIFEST_FILE}):  # readers use every file there
            raise DamagedError(folder, f"it has {name}, which its manifest does not list")
        wanted = {name: digest for name, digest in files.items() if name.startswith(part)}
        for name in sorted(wanted.keys() - there):
            raise DamagedError(folder, name)
        sizes = {name: (folder / name).stat().st_size for name in wanted}
        total = sum(sizes.values())
        with Progress(
            f"verify {folder.name}", "B", total, scale=True, disable=total < _SHOW_PROGRESS
        ) as bar:
            for name, digest in wanted.items():
                if sha256(folder / name) != digest:
                    raise DamagedError(folder, name)
                bar.update(sizes[name])
    except OSError as error:
        raise DamagedError(folder, f"{error.filename}: {error.strerror}") from None
    return position


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
