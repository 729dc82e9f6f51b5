"""Measurements of a model: one JSON line each in a results.jsonl.

    {"kind": "finetune", "arm": "base", "model": "runs/base/release", "settings": {...},
     "values": {...}, ...}

A line contains everything needed to repeat it. Several processes may append to one file. The file
may be shared: nothing in it reveals which elements are in a ticket.
"""

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmp_ds import __version__, formats
from pmp_ds.errors import UserError, require
from pmp_ds.fields import fit
from pmp_ds.foreign import parse_object, read_text
from pmp_ds.model.folder_rules import check_files
from pmp_ds.run_dir import lock
from pmp_ds.version import UNKNOWN, code_version

MOST_BYTES = 1 << 28
"""Maximum bytes of a results.jsonl: a study of 400 fine-tunings has 2 MB."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement of one model."""

    kind: str
    """`finetune`, or a measurement of pmp-ds evaluate: `perplexity`, `landscape`, ..."""
    arm: str
    """The model's name in tables: `base`, `pmp`, `random`."""
    model: str
    """The model's folder as given."""
    model_digest: str
    """`model_digest` of its folder."""
    settings: dict[str, Any]
    """Everything besides the model that determines the numbers, as JSON: task, method, seed, ..."""
    values: dict[str, Any]
    """The numbers."""
    seconds: float
    """Wall time."""
    hardware: str
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    version: str = __version__
    commit: str = field(default_factory=lambda: code_version().commit)
    """The commit of the code that measured."""

    @property
    def key(self) -> str:
        """A key that is the same for the same measurement of the same weights."""
        return key(self.kind, self.model_digest, self.settings)


def key(kind: str, model_digest: str, settings: dict[str, Any]) -> str:
    """Return the sha256 (hex) of everything that determines a measurement."""
    text = json.dumps([kind, model_digest, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def mark(ticket_id: str) -> str:
    """Return what the setting `ticket` of a result says: the same for the same ticket, and nothing
    about it."""
    return hashlib.sha256(f"result of {ticket_id}".encode()).hexdigest()[:16]


def find(
    known: Mapping[str, Result], kind: str, model_digest: str, settings: dict[str, Any]
) -> Result | None:
    """Return the result of such a measurement among those ``known`` by key. Version 0.1.0
    wrote neither the ticket nor the tasks of one's own: its results count for any of that name."""
    before = {n: value for n, value in settings.items() if n not in ("ticket", "task_dir")}
    keys = (key(kind, model_digest, one) for one in (settings, before))
    return next((known[one] for one in keys if one in known), None)


def model_digest(folder: Path) -> str:
    """Return the sha256 (hex) over the weights and config.json in a model's folder. Raises
    UserError when they are not regular files in it."""
    check_files(folder)
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    digest = hashlib.sha256()
    for path in files:
        require(path.is_file(), f"{folder} is not a model: {path.name} is not a file in it")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def arm_of(model: str) -> str:
    """Return `pmp` for runs/pmp/release."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "release" else folder.name


def append(path: Path, result: Result) -> None:
    """Append one line, on disk on return, after removing a last line cut off by a kill. A whole
    one, whose end an editor took away, gets it back."""
    values = asdict(result) | {"format_version": formats.current("results")}
    line = (json.dumps(values, sort_keys=True) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        lock(file)
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            start = content.rfind(b"\n") + 1
            try:
                parse_object(content[start:].decode())
                line = b"\n" + line
            except ValueError:
                file.truncate(start)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Result]:
    """Return all measurements, oldest first, the last one per key, without a last line cut off by a
    kill. Raises UserError that names a damaged line."""
    found: dict[str, Result] = {}
    content = read_text(path, MOST_BYTES) if path.exists() else ""
    for number, line in enumerate(io.StringIO(content), start=1):
        where = f"{path}, line {number}"
        try:
            values = parse_object(line)
        except ValueError as error:
            if not line.endswith("\n"):
                break
            raise UserError(f"{where} is damaged: {error}; repair or delete it") from None
        result = _of_line(values, where)
        found.pop(result.key, None)
        found[result.key] = result
    return list(found.values())


def _of_line(values: dict[str, Any], where: str) -> Result:
    found = fit(int, values.pop("format_version", 1), f"{where}: format_version")
    version = formats.require("results", f"{where},", found, way_out="use that version")
    defaults = {"commit": UNKNOWN} if version == 1 else {}
    result: Result = fit(Result, defaults | values, where)
    return result


def hardware() -> str:
    """Return this machine in words: GPUs, or the CPU and its cores."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}"
