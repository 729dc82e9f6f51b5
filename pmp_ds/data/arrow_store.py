"""The packed store on disk: Arrow shards, a manifest, and readers that trust the manifest alone.

The format is described in tokenized_data/README.md. Imports without torch.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pmp_ds.data.readahead import will_need
from pmp_ds.errors import UserError
from pmp_ds.run_dir import atomic_path, write_json

FORMAT = "pmp-ds packed tokens"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
COLUMN = "input_ids"
MUST_AGREE = ("block_size", "dtype", "vocab_size", "eos_id", "bos_id")
"""What stores that are read together have in common, beside the tokenizer."""
SHARD_BLOCKS = 1 << 18
"""Most blocks in one shard: 128 MiB of 256 uint16 tokens."""

Tokens = npt.NDArray[np.unsignedinteger]

COLD_SECONDS = 5e-6
"""A block that takes longer came from a disk (10 to 100 microseconds), not from memory (one)."""

_AGAIN = "run launcher/prepare_data.py again (delete the folder first)"


def write_shard(
    folder: Path,
    split: str,
    name: str,
    blocks: Tokens,  # (n, block_size) uint16 or uint32
) -> dict[str, Any]:
    """Write one shard, complete or not at all; return its manifest entry."""
    assert 0 < len(blocks) <= SHARD_BLOCKS
    values = pa.array(np.ascontiguousarray(blocks).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, blocks.shape[1])
    batch = pa.record_batch([column], names=[COLUMN])
    digest = hashlib.sha256()
    with atomic_path(folder / split / name) as temporary:
        with open(temporary, "wb") as file:
            sink = _Hashed(file, digest)
            with pa.ipc.new_stream(pa.PythonFile(sink, "w"), batch.schema) as writer:
                writer.write_batch(batch)
        num_bytes = temporary.stat().st_size
    return {
        "file": f"{split}/{name}",
        "bytes": num_bytes,
        "rows": len(blocks),
        "sha256": digest.hexdigest(),
    }


class _Hashed:
    """A file that is hashed as it is written, so that a shard is never in memory twice."""

    closed = False

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Complete the store: the files `datasets` wants, then ``manifest.json`` with its dataset id.

    ``manifest`` needs ``splits`` (shards as ``write_shard`` returns them), ``block_size``,
    ``dtype``, ``vocab_size``, ``eos_id``, ``tokenizer`` and ``unigram_cross_entropy``; a ``bos_id``
    where one leads every document.
    """
    dataset_id = _dataset_id(manifest)
    item = {"dtype": manifest["dtype"], "_type": "Value"}
    features = {COLUMN: {"feature": item, "length": manifest["block_size"], "_type": "List"}}
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        state: dict[str, Any] = {
            "_data_files": [{"filename": Path(shard["file"]).name} for shard in shards],
            "_fingerprint": hashlib.sha256(f"{dataset_id}:{split}".encode()).hexdigest()[:16],
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
            "dataset_id": dataset_id,
        },
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store; UserError when there is none or this version cannot read it."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"the data folder {folder} {what}: it is not a complete store; make it with "
            f"`python launcher/prepare_data.py --out {folder}`"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a packed store: {_AGAIN}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}: {_AGAIN}, or use the version of pmp-ds that wrote it"
        )
    return manifest


class Blocks:
    """The blocks of one split, mapped from its shards without a copy."""

    def __init__(
        self,
        views: list[Tokens],  # each (rows, block_size)
    ) -> None:
        self.views = views
        """The blocks of every shard in order, each ``(rows, block_size)``, read-only."""
        self._ends = np.cumsum([len(view) for view in views])
        self._starts = self._ends - [len(view) for view in views]
        self.block_size: int = views[0].shape[1]
        self._cold = False

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(
        self,
        indices: npt.NDArray[np.integer],  # (n,)
    ) -> Tokens:
        """Copy these blocks, in this order, into one ``(n, block_size)`` array.

        Raises IndexError for an index outside ``[0, len(self))``.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"block index outside [0, {len(self)})")
        out = np.empty((len(indices), self.block_size), self.views[0].dtype)
        clock = time.perf_counter()
        wanted = list(self._by_shard(indices))
        if self._cold:
            for view, _, rows in wanted:
                will_need(view, rows)
        for view, here, rows in wanted:
            out[here] = view[rows]
        self._cold = time.perf_counter() - clock > COLD_SECONDS * len(indices)
        return out

    def _by_shard(
        self, indices: npt.NDArray[np.integer]
    ) -> Iterator[tuple[Tokens, npt.NDArray[np.integer], npt.NDArray[np.integer]]]:
        """Of each shard concerned: its blocks, where in ``indices`` it is meant, and its rows."""
        shards = np.searchsorted(self._ends, indices, side="right")
        order = np.argsort(shards, kind="stable")
        cuts = np.searchsorted(shards, np.arange(len(self.views) + 1), sorter=order)
        for shard in np.flatnonzero(np.diff(cuts)):
            here = order[cuts[shard] : cuts[shard + 1]]
            yield self.views[shard], here, indices[here] - self._starts[shard]

    def largest(self) -> list[int]:
        """The largest id of every shard; reads all of them."""
        return [int(view.max()) for view in self.views]

    def gather_ref(self, indices: npt.NDArray[np.integer]) -> Tokens:
        """What ``gather`` does, block by block."""
        everything = [block for view in self.views for block in view]
        return np.stack([everything[i] for i in indices])


class Store:
    """An opened store; ``open`` is the only way to get one."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits: dict[str, Blocks] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "Store":
        """Map every shard and check its size and shape; with ``verify`` as ``verify`` does.

        Raises UserError that names the file for anything missing, truncated, altered or of
        another version.
        """
        folder = Path(path)
        store = cls(folder, read_manifest(folder))
        try:
            for split in SPLITS:
                shards = store.manifest["splits"][split]["shards"]
                for shard in shards if verify else ():
                    store._check_hash(shard)  # before Arrow, which a bad header can crash
                store._splits[split] = Blocks([store._map(shard) for shard in shards])
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{folder / 'manifest.json'} is damaged ({error!r}): {_AGAIN}"
            ) from error
        if verify:
            store._check_content()
        return store

    def split(self, name: str) -> Blocks:
        """``train`` or ``validation``."""
        return self._splits[name]

    def verify(self) -> int:
        """Hash every shard and the tokenizer, and check every token; return the shards' bytes.

        Raises UserError that names the first altered file.
        """
        shards = [s for split in SPLITS for s in self.manifest["splits"][split]["shards"]]
        for shard in shards:
            self._check_hash(shard)
        self._check_content()
        return sum(shard["bytes"] for shard in shards)

    @property
    def block_size(self) -> int:
        return int(self.manifest["block_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    @property
    def eos_id(self) -> int:
        return int(self.manifest["eos_id"])

    @property
    def bos_id(self) -> int | None:
        """The id that leads every document, if one does."""
        found: int | None = self.manifest.get("bos_id")
        return found

    @property
    def dataset_id(self) -> str:
        """sha256 over everything that decides which tokens are where."""
        return str(self.manifest["dataset_id"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.manifest["tokenizer"]["fingerprint"])

    @property
    def tokenizer_dir(self) -> Path:
        """A folder that ``AutoTokenizer.from_pretrained`` reads."""
        return self.folder / "tokenizer"

    @property
    def unigram_cross_entropy(self) -> float:
        """Nats per predicted validation token of a model that knows only token frequencies."""
        return float(self.manifest["unigram_cross_entropy"])

    def unlike(self, other: "Store") -> list[str]:
        """Why blocks of the two do not go together, with both values; empty when they do."""
        found = [
            f"{key} is {self.manifest.get(key)} and {other.manifest.get(key)}"
            for key in MUST_AGREE
            if self.manifest.get(key) != other.manifest.get(key)
        ]
        prints = self.tokenizer_fingerprint, other.tokenizer_fingerprint
        if prints[0] != prints[1]:
            found.append(f"the tokenizer is {prints[0][:12]} and {prints[1][:12]}")
        return found

    def _check_hash(self, shard: Mapping[str, Any]) -> None:
        path = self.folder / shard["file"]
        _check_size(path, shard["bytes"])
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            _damaged(path, f"it cannot be read ({error})")
        if digest != shard["sha256"]:
            _damaged(path, "its content changed since it was written (sha256 differs)")

    def _check_content(self) -> None:
        if self.manifest["dataset_id"] != _dataset_id(self.manifest):
            raise UserError(
                f"{self.folder / 'manifest.json'} was altered (its dataset_id does not match): "
                f"{_AGAIN}"
            )
        for name, digest in self.manifest["tokenizer"].get("files", {}).items():
            path = self.tokenizer_dir / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise UserError(
                    f"tokenizer file {path} is missing or was changed since the text was "
                    f"tokenized with it: put it back, or {_AGAIN}"
                )
        for split in SPLITS:
            shards = self.manifest["splits"][split]["shards"]
            for shard, largest in zip(shards, self._splits[split].largest(), strict=True):
                if largest >= self.vocab_size:
                    path = self.folder / shard["file"]
                    _damaged(path, f"token {largest} is outside vocab_size={self.vocab_size}")

    def _map(self, shard: Mapping[str, Any]) -> Tokens:
        """The tokens of one shard, ``(rows, block_size)``, zero-copy."""
        path = self.folder / shard["file"]
        try:
            _check_size(path, shard["bytes"])
            # Closed at once: the mapping stays, and thousands of shards need no descriptors.
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                batch = reader.read_next_batch()
            batch.validate()
            column = batch.column(COLUMN)
            values = column.values.to_numpy(zero_copy_only=True)
            blocks: Tokens = values.reshape(-1, column.type.list_size)
        except (OSError, pa.ArrowException, KeyError, AttributeError, StopIteration) as error:
            _damaged(path, f"it cannot be read ({error})")
        expected = (shard["rows"], self.block_size)
        if blocks.shape != expected or blocks.dtype != np.dtype(self.manifest["dtype"]):
            _damaged(
                path,
                f"it holds {blocks.shape} {blocks.dtype}, the manifest says {expected} "
                f"{self.manifest['dtype']}",
            )
        return blocks


def _check_size(path: Path, num_bytes: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        _damaged(path, "it is missing")
    if size != num_bytes:
        _damaged(path, f"it has {size} bytes, the manifest says {num_bytes}")


def _damaged(path: Path, what: str) -> NoReturn:
    raise UserError(f"data shard {path} is damaged: {what}; {_AGAIN}")


def _dataset_id(manifest: Mapping[str, Any]) -> str:
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
