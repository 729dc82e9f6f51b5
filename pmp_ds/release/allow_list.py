"""The permitted content of a folder that is published: file names, keys, dtypes; nothing personal.

    problems(folder)       every breach, `FILE: what`; none for a clean release
    require_clean(folder)  the same as one UserError

It reads the finished folder as a stranger would, without the run. Anything not listed here is a
breach, so a new file, key or field must be added here on purpose.
"""

import getpass
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from pmp_ds.errors import UserError
from pmp_ds.foreign import ForeignError, read_bytes, read_object, read_text
from pmp_ds.model.folder_rules import INDEX_FILE
from pmp_ds.release.architecture import strangers
from pmp_ds.release.older_names import older_names
from pmp_ds.release.source import open_source
from pmp_ds.release.tokenizer_files import (
    TOKENIZER_FILES,
    TOKENIZER_JSON_KEYS,
    TOKENIZER_KEYS,
    trainer_paths,
)
from pmp_ds.run_dir import sha256
from pmp_ds.tensor_file import METADATA

SUMS_FILE, SIGNATURE_FILE = "SHA256SUMS", "model.sig"
REQUIRED = {"README.md", SUMS_FILE, "config.json", "generation_config.json"}
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors")
CONFIG_KEYS = {
    "architectures",
    "dtype",
    "experts_implementation",
    "model_type",
    "transformers_version",
}
GENERATION_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
_TEXTS = (".md", ".json", ".jinja")
_FORBIDDEN = {
    "an absolute path": re.compile(r"(?<![\w:/.<])/[\w.-]+/[\w./-]+|~/\w|\b[A-Z]:\\\w|file://"),
    "a path inside a run": re.compile(r"\b(?:runs|private|checkpoints|tokenized_data)/\w"),
    "a time of day": re.compile(r"\b\d\d:\d\d:\d\d\b|\d{4}-\d\d-\d\d[T ]\d\d"),
    "a time in seconds": re.compile(r"(?<![\d,.])1[6-9]\d{8}\.\d+"),
    "a name from training": re.compile(r"exp_avg|param_mask|ticket_id|theta0|master_weights"),
}
# Words too common to reveal anything.
_NOBODY = {
    "root",
    "user",
    "admin",
    "ubuntu",
    "debian",
    "runner",
    "nobody",
    "localhost",
    "docker",
    "model",
    "data",
    "train",
    "test",
    "node",
    "host",
    "main",
}


def require_clean(folder: Path) -> None:
    """Raise UserError that lists every breach."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if found := problems(folder):
        raise UserError(f"{folder} must not be published:\n  " + "\n  ".join(found))


def problems(folder: Path) -> list[str]:
    """Return every breach of the allow-list in ``folder``, as `FILE: what`."""
    return list(_problems(folder))


def is_release_file(name: str) -> bool:
    """Return whether a file of this name, directly in the folder, may be in a release."""
    known = REQUIRED | {*TOKENIZER_FILES, INDEX_FILE, SIGNATURE_FILE}
    return name in known or _WEIGHTS.fullmatch(name) is not None


def _problems(folder: Path) -> Iterator[str]:
    paths = sorted(folder.iterdir())
    regular = [path for path in paths if path.is_file() and not path.is_symlink()]
    names = {path.name for path in regular}
    for path in paths:
        if path not in regular:
            yield f"{path.name}: not a regular file"
        elif not is_release_file(path.name):
            yield f"{path.name}: not a file of a release"
        elif path.stat().st_mode & 0o133:
            yield f"{path.name}: its mode lets others write it, or anyone execute it"
    for name in sorted(REQUIRED - names):
        yield f"{name}: missing"
    for path in regular:
        if path.suffix in _TEXTS:
            yield from _about_words(path)
    yield from _about_tokenizer(folder, names)
    yield from about_model(folder)
    if SUMS_FILE in names:
        yield from _about_sums(folder, names)


def about_model(folder: Path) -> Iterator[str]:
    """Yield breaches in the configs and weights alone."""
    names = {path.name for path in folder.iterdir()}
    config = _read_json(folder / "config.json")
    yield from _about_config(config)
    generation = _read_json(folder / "generation_config.json")
    yield from _about_keys("generation_config.json", generation, GENERATION_KEYS)
    yield from _about_weights(folder, names, config)


def _read_json(path: Path) -> Any:
    """Return the content, or None if it is missing or unreadable."""
    try:
        return read_object(path)
    except ForeignError:
        return None


def _about_keys(file: str, values: Any, allowed: set[str]) -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{file}: not a JSON object"
        return
    for key in sorted(values.keys() - allowed):
        yield f"{file}: the key {key!r} is not on the list"


def _about_config(config: Any) -> Iterator[str]:
    """Check config.json: only keys that the architecture needs, under older and newer names, and
    how to load it."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        yield from _about_keys("config.json", config, CONFIG_KEYS)
        return
    older = older_names(kind, config)
    for key in sorted({*strangers(CONFIG_MAPPING[kind], config)} - CONFIG_KEYS - older.keys()):
        yield f"config.json: the key {key!r} is not on the list"
    # Older and newer names of a key have the same value; old releases have only the newer ones.
    for key, value in older.items():
        if key in config and config[key] != value:
            yield f"config.json: {key} is {config[key]!r}, but its newer name says {value!r}"


def _about_tokenizer(folder: Path, names: set[str]) -> Iterator[str]:
    for file, keys in (
        ("tokenizer.json", TOKENIZER_JSON_KEYS),
        ("tokenizer_config.json", TOKENIZER_KEYS),
        ("special_tokens_map.json", TOKENIZER_KEYS),
    ):
        if file in names:
            yield from _about_keys(file, _read_json(folder / file), keys)
    if "tokenizer.model" in names:
        for text in trainer_paths(read_bytes(folder / "tokenizer.model")):
            yield f"tokenizer.model: remembers {text!r} from its training"


def _about_weights(folder: Path, names: set[str], config: Any) -> Iterator[str]:
    weights = sorted(name for name in names if _WEIGHTS.fullmatch(name))
    try:
        source = open_source(folder)
    except UserError as error:
        yield f"weights: {error}"
        return
    source.close()
    if str(source.dtype) != f"torch.{config.get('dtype')}":
        yield f"config.json: says {config.get('dtype')}, but the weights are {source.dtype}"
    files = {file.path.name: file for file in source.files.values()}
    for name in sorted(set(weights) - files.keys()):
        yield f"{name}: contains nothing of the model"
    for name, file in sorted(files.items()):
        if file.metadata != METADATA:
            yield f"{name}: its metadata are {file.metadata}, not {METADATA}"
    if INDEX_FILE in names:
        index = _read_json(folder / INDEX_FILE)
        yield from _about_keys(INDEX_FILE, index, {"metadata", "weight_map"})
        yield from _about_keys(INDEX_FILE, index.get("metadata"), {"total_size"})
        if index["weight_map"] != {name: file.path.name for name, file in source.files.items()}:
            yield f"{INDEX_FILE}: its weight_map does not match the files"


def _about_sums(folder: Path, names: set[str]) -> Iterator[str]:
    """Require SHA256SUMS to name every file except itself and the signature, once and correctly."""
    lines = read_text(folder / SUMS_FILE).splitlines()
    parts = [line.split("  ", 1) for line in lines]
    if sorted(part[-1] for part in parts) != sorted(names - {SUMS_FILE, SIGNATURE_FILE}):
        yield f"{SUMS_FILE}: does not name every file once"
    for digest, *rest in parts:
        path = folder / "".join(rest)
        if path.name in names and sha256(path) != digest:
            yield f"{path.name}: does not match {SUMS_FILE}"


def _about_words(path: Path) -> Iterator[str]:
    """Check all texts except the vocabulary of tokenizer.json, which may contain any text."""
    if path.name == "tokenizer.json":
        return
    text = read_bytes(path).decode(errors="replace")
    for what, pattern in _FORBIDDEN.items():
        if match := pattern.search(text):
            yield f"{path.name}: {match[0]!r} is {what}"
    for what, word in (("user", getpass.getuser()), ("host", socket.gethostname().split(".")[0])):
        # Podman and Kubernetes name a user after its number, which may occur in any release.
        telling = len(word) > 2 and not word.isdecimal() and word.lower() not in _NOBODY
        if telling and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            yield f"{path.name}: {word!r} is the name of this {what}"
