"""The manifest of a packed store, and the files that make the store readable by `datasets`.

Only the files named in the manifest are trusted. tokenized_data/README.md describes the format.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from pmp_ds import formats
from pmp_ds.errors import UserError, quoted
from pmp_ds.fields import fit
from pmp_ds.foreign import ForeignError, MissingError, read_object
from pmp_ds.run_dir import write_json

FORMAT = "pmp-ds packed tokens"
FORMAT_VERSION = formats.current("store")
SPLITS = ("train", "validation")
COLUMN = "input_ids"
MUST_AGREE = ("block_size", "dtype", "vocab_size", "eos_id", "bos_id")
"""Properties that stores read together must share, besides the tokenizer."""
AGAIN = "run pmp-ds prepare-data again (delete the folder first)"
"""The way out of a damaged store."""


_MOST_BYTES = 1 << 28  # in a manifest: half a million shards


class Shard(TypedDict):
    """One file of a split."""

    file: str
    bytes: int
    rows: int
    sha256: str


class Split(TypedDict):
    """The blocks of `train` or `validation`."""

    blocks: NotRequired[int]
    documents: NotRequired[int]
    shards: list[Shard]


class Splits(TypedDict):
    """Both splits."""

    train: Split
    validation: Split


class TokenizerEntry(TypedDict):
    """The manifest's entry for the tokenizer."""

    fingerprint: str
    files: NotRequired[dict[str, str]]


class Input(TypedDict):
    """One entry of `settings.input`."""

    input: str


class Settings(TypedDict):
    """The settings that readers of the manifest use."""

    input: NotRequired[list[Input]]


class Manifest(TypedDict):
    """The part of a manifest that every reader may rely on; there is more."""

    dataset_id: str
    block_size: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_id: int
    bos_id: NotRequired[int | None]
    unigram_cross_entropy: float
    splits: Splits
    settings: NotRequired[Settings]
    tokenizer: TokenizerEntry


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Complete the store: the files for `datasets`, then ``manifest.json`` with its dataset id.

    ``manifest`` needs ``splits`` (shards as ``write_shard`` returns them), ``block_size``,
    ``dtype``, ``vocab_size``, ``eos_id``, ``tokenizer`` and ``unigram_cross_entropy``, and a
    ``bos_id`` if one starts every document.
    """
    identity = dataset_id(manifest)
    item = {"dtype": manifest["dtype"], "_type": "Value"}
    features = {COLUMN: {"feature": item, "length": manifest["block_size"], "_type": "List"}}
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        state: dict[str, Any] = {
            "_data_files": [{"filename": Path(shard["file"]).name} for shard in shards],
            "_fingerprint": hashlib.sha256(f"{identity}:{split}".encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_json(folder / split / "state.json", state)
        write_json(folder / split / "dataset_info.json", {"features": features})
    write_json(folder / "dataset_dict.json", {"splits": list(SPLITS)})
    write_json(
        folder / "manifest.json",
        {
            **manifest,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dataset_id": identity,
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a store. Raises UserError if it is missing or unreadable here."""
    path = folder / "manifest.json"
    try:
        manifest = read_object(path, _MOST_BYTES)
    except MissingError as error:
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"the data folder {folder} {what}: it is not a complete store; make it with "
            f"`pmp-ds prepare-data --out {quoted(folder)}`"
        ) from error
    except ForeignError as error:
        raise UserError(f"{error}: {AGAIN}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a packed store: {AGAIN}")
    try:
        found = manifest.get("format_version")
        formats.require("store", folder, found, way_out=f"use that version, or {AGAIN}")
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from None
    try:
        fit(Manifest, manifest, path)
    except UserError as error:
        raise UserError(f"{error}: {AGAIN}") from None
    return manifest


def dataset_id(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 over everything that determines the tokens and their places."""
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "block_size": manifest["block_size"],
        "dtype": manifest["dtype"],
        "vocab_size": manifest["vocab_size"],
        "eos_id": manifest["eos_id"],
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "shards": {
            split: [
                (shard["rows"], shard["sha256"]) for shard in manifest["splits"][split]["shards"]
            ]
            for split in SPLITS
        },
    }
    if manifest.get("bos_id") is not None:
        content["bos_id"] = manifest["bos_id"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
