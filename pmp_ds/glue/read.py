"""A task's rows, from a local folder or from the Hugging Face hub.

A local folder has GLUE's layout, every file as JSON lines, plain or .gz:

    <folder>/SST-2/train.jsonl           {"sentence": "a fine film", "label": 1}
    <folder>/SST-2/validation.jsonl.gz
    <folder>/MNLI/train_sample.jsonl     {"premise": "...", "hypothesis": "...", "label": "neutral"}
    <folder>/MNLI/validation_matched.jsonl

Task folders may also have the hub's name (`sst2`), in any case. A split may have a longer name if
it is the only one (`train_sample`). Labels are integers or the task's words; for STS-B numbers from
0 to 5.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pmp_ds.errors import UserError, require
from pmp_ds.foreign import parse, read_bytes
from pmp_ds.glue.tasks import MAX_SIMILARITY, Task

HUB = "nyu-mll/glue"

_MOST_BYTES = 1 << 28
"""Maximum bytes of an unpacked file: QQP's training rows have 60 MB."""
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Rows:
    """Texts and their labels."""

    texts: list[tuple[str, ...]]
    """One or two strings per row, in the order of `Task.fields`."""
    labels: np.ndarray
    """(len(texts),) int64 classes, or float32 in [0, 5] for regression."""

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def sha256(self) -> str:
        """The sha256 (hex) of texts and labels in their order."""
        digest = hashlib.sha256()
        for row in zip(self.texts, self.labels.tolist(), strict=True):
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> "Rows":
        """Return the rows at ``indices``, in that order."""
        return Rows([self.texts[i] for i in indices.tolist()], self.labels[indices])


@dataclass(frozen=True)
class TaskData:
    """The data for fine-tuning and evaluating one task."""

    task: Task
    train: Rows
    validation: dict[str, Rows]
    """Validation rows by column of the paper's table; MNLI has two."""


def load(
    task: Task, folder: Path | None, max_train: int | None = None, seed: int = 0, hub: str = HUB
) -> TaskData:
    """Return the rows of ``task`` from a local ``folder``, or from the dataset ``hub`` without one.

    ``max_train`` keeps that many training rows, drawn uniformly by ``seed``; smaller numbers draw
    part of the same rows. Raises UserError for anything missing or malformed.
    """
    require(max_train is None or max_train > 0, f"max_train={max_train} must be at least 1 row")
    if folder is None:
        splits = {split: _read_hub(task, hub, split) for split in ("train", *task.splits)}
    else:
        files = _find_files(task, folder)
        splits = {split: _read_file(task, file) for split, file in files.items()}
    train = splits.pop("train")
    if max_train is not None and max_train < len(train):
        drawn = np.random.default_rng(seed).permutation(len(train))[:max_train]
        train = train.take(np.sort(drawn))
    return TaskData(task, train, {task.splits[split]: rows for split, rows in splits.items()})


def _find_files(task: Task, folder: Path) -> dict[str, Path]:
    """Return split -> file, for the validation splits that exist."""
    require(folder.is_dir(), f"glue_dir={folder} is not a folder: name one with {task.folder}/")
    names = {task.folder.lower(), task.name}
    folders = [path for path in sorted(folder.iterdir()) if path.name.lower() in names]
    found = ", ".join(path.name for path in sorted(folder.iterdir())) or "nothing"
    require(folders != [], f"{folder} has no folder {task.folder}/, only {found}")
    home = _only(folders)
    files = {split: _find_split(home, split) for split in ("train", *task.splits)}
    missing = [split for split, file in files.items() if file is None]
    if "train" in missing or len(missing) == len(task.splits):
        found = ", ".join(path.name for path in sorted(home.iterdir())) or "nothing"
        raise UserError(f"{home} has no {missing[0]}.jsonl or {missing[0]}.jsonl.gz, only {found}")
    return {split: file for split, file in files.items() if file is not None}


def _find_split(home: Path, split: str) -> Path | None:
    """Return `train.jsonl`, or the only file such as `train_sample.jsonl.gz`, or None."""
    files = [path for path in sorted(home.iterdir()) if path.name.endswith(_SUFFIXES)]
    exact = [path for path in files if path.name.partition(".jsonl")[0] == split]
    longer = [path for path in files if path.name.startswith(split)]
    return _only(exact or longer) if longer else None


def _only(paths: list[Path]) -> Path:
    names = ", ".join(path.name for path in paths)
    require(len(paths) == 1, f"{paths[0].parent} has several of one kind: {names}; keep one")
    return paths[0]


def _read_file(task: Task, file: Path) -> Rows:
    try:
        content = read_bytes(file, _MOST_BYTES)
        if file.name.endswith(".gz"):
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(_MOST_BYTES + 1)
            require(len(content) <= _MOST_BYTES, f"{file} is longer than {_MOST_BYTES:,} bytes")
        lines = io.BytesIO(content)
        numbered = ((i, line) for i, line in enumerate(lines, start=1) if line.strip())
        return _parse(task, numbered, f"{file}, line", _decode)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again") from error


def _decode(line: bytes) -> Any:
    try:
        return parse(line)
    except ValueError as error:
        said = line[:60].decode(errors="replace").strip()
        raise ValueError(f"{error}: {said!r}") from error


def _read_hub(task: Task, hub: str, split: str) -> Rows:
    import datasets

    name = f"{hub}, {task.name}, {split}"
    try:
        table = datasets.load_dataset(hub, task.name, split=split)
    except Exception as error:  # network, hub and files each raise their own
        raise UserError(
            f"{name} cannot be read ({error}): set glue_dir to a folder with "
            f"{task.folder}/train.jsonl, or connect to the hub"
        ) from error
    return _parse(task, enumerate(table), f"{name}, row")


def _parse(
    task: Task,
    rows: Iterable[tuple[int, Any]],
    source: str,
    decode: Callable[[Any], Any] = lambda row: row,
) -> Rows:
    """Check the numbered rows of a split; messages begin with ``source`` and the number."""
    texts, labels = [], []
    for number, row in rows:
        try:
            row_texts, label = _row(task, decode(row))
        except ValueError as error:
            raise UserError(f"{source} {number}: {error}; fix or delete it") from error
        texts.append(row_texts)
        labels.append(label)
    require(texts != [], f"{source.rpartition(',')[0]} has no rows: {task.name} needs some")
    return Rows(texts, np.array(labels, np.float32 if task.is_regression else np.int64))


def _row(task: Task, row: Any) -> tuple[tuple[str, ...], float]:
    """Return texts and label of one decoded row. Raises ValueError that describes the fault."""
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.60} is not a JSON object")
    for field in (*task.fields, "label"):
        if field not in row:
            found = ", ".join(row)
            raise ValueError(f"no field {field!r}, which {task.name} needs, only {found:.200}")
    for field in task.fields:
        if not isinstance(row[field], str):
            raise ValueError(f"field {field!r} is {row[field]!r:.60}, not a text")
        row[field].encode()  # "\ud800": JSON can contain half a character
    return tuple(row[field] for field in task.fields), _label(task, row["label"])


def _label(task: Task, value: Any) -> float:
    if task.labels is not None and value in task.labels:
        return task.labels.index(value)
    top = MAX_SIMILARITY if task.labels is None else len(task.labels) - 1
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value <= top and (task.is_regression or int(value) == value):
        return float(value)
    words = "" if task.labels is None else f" or one of {', '.join(task.labels)}"
    raise ValueError(f"label {value!r:.60} is not a number from 0 to {top:g}{words}")
