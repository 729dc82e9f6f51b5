"""The packed store on disk: Arrow shards, mapped and checked against the manifest.

The format is described in tokenized_data/README.md. Imports without torch.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa

from pmp_ds.data.arrow_header import is_packed
from pmp_ds.data.blocks import Blocks, Tokens
from pmp_ds.data.manifest import AGAIN, COLUMN, MUST_AGREE, SPLITS, dataset_id, read_manifest
from pmp_ds.errors import UserError
from pmp_ds.foreign import read_bytes
from pmp_ds.progress import Progress
from pmp_ds.run_dir import atomic_path, sha256

SHARD_BLOCKS = 1 << 18
"""Maximum blocks in one shard: 128 MiB of 256 uint16 tokens."""

_SHOW_PROGRESS = 1 << 30  # minimum bytes: a second of hashing


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
    """A file that is hashed while it is written, so that a shard is in memory only once."""

    closed = False

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class Store:
    """An opened store; ``open`` is the only way to get one."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards: list[dict[str, Any]] = [
            shard for split in SPLITS for shard in manifest["splits"][split]["shards"]
        ]
        """The manifest's entries of all splits."""
        self.block_size: int = manifest["block_size"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.bos_id: int | None = manifest.get("bos_id")
        """The id at the start of every document, if any."""
        self.dataset_id: str = manifest["dataset_id"]
        """sha256 over everything that determines the tokens and their places."""
        self.tokenizer_fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.tokenizer_dir = folder / "tokenizer"
        """A folder that ``AutoTokenizer.from_pretrained`` reads."""
        self.unigram_cross_entropy = float(manifest["unigram_cross_entropy"])
        """Nats per predicted validation token of a model that knows only token frequencies."""
        self._splits: dict[str, Blocks] = {}
        self._views: list[Tokens] = []  # of all shards

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "Store":
        """Map every shard and check its size and shape; with ``verify``, also call ``verify``.

        Raises UserError that names the file for anything missing, truncated, altered or of
        another version.
        """
        folder = Path(path)
        store = cls(folder, read_manifest(folder))
        try:
            for split in SPLITS:
                shards = store.manifest["splits"][split]["shards"]
                for shard in shards:
                    _check_name(folder, split, shard["file"])
                for shard in shards if verify else ():
                    store._check_hash(shard)  # before Arrow, which a bad header can crash
                views = [store._map(shard) for shard in shards]
                store._splits[split] = Blocks(views)
                store._views += views
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{folder / 'manifest.json'} is damaged ({error!r}): {AGAIN}"
            ) from error
        if verify:
            store.check_facts()
            for number in range(len(store.shards)):
                store._check_tokens(number)
        return store

    def split(self, name: str) -> Blocks:
        """Return the blocks of ``train`` or ``validation``."""
        return self._splits[name]

    def verify(self) -> int:
        """Hash every shard and the tokenizer, and check every token; return the shards' bytes.

        Raises UserError that names the first altered file.
        """
        self.check_facts()
        total = sum(shard["bytes"] for shard in self.shards)
        quick = total < _SHOW_PROGRESS
        with Progress("verify data", "B", total, scale=True, disable=quick) as bar:
            for number, shard in enumerate(self.shards):
                self.check_shard(number)
                bar.update(shard["bytes"])
        return total

    def check_facts(self) -> None:
        """Raise UserError for a manifest or a tokenizer that was altered."""
        if self.manifest["dataset_id"] != dataset_id(self.manifest):
            raise UserError(
                f"{self.folder / 'manifest.json'} was altered (its dataset_id does not match): "
                f"{AGAIN}"
            )
        for name, digest in self.manifest["tokenizer"].get("files", {}).items():
            path = self.tokenizer_dir / name
            if not path.is_file() or hashlib.sha256(read_bytes(path)).hexdigest() != digest:
                raise UserError(
                    f"tokenizer file {path} is missing or was changed since the text was "
                    f"tokenized with it: restore it, or {AGAIN}"
                )

    def check_shard(self, number: int) -> None:
        """Hash one of ``shards`` and check its tokens. Raises UserError when it is altered."""
        self._check_hash(self.shards[number])
        self._check_tokens(number)

    def look(self, number: int) -> os.stat_result:
        """Return the file status of one of ``shards``. Raises UserError when its size is wrong."""
        shard = self.shards[number]
        return _check_size(self.folder / shard["file"], shard["bytes"])

    @property
    def stores(self) -> "list[Store]":
        """This store alone; a mixture has several."""
        return [self]

    @property
    def parts(self) -> tuple[()]:
        return ()

    def unlike(self, other: "Store") -> list[str]:
        """Return the reasons, with both values, why the blocks of two stores cannot be combined."""
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
            digest = sha256(path)
        except OSError as error:
            _damaged(path, f"it cannot be read ({error})")
        if digest != shard["sha256"]:
            _damaged(path, "its content changed since it was written (sha256 differs)")

    def _check_tokens(self, number: int) -> None:
        largest = int(self._views[number].max())
        if largest >= self.vocab_size:
            path = self.folder / self.shards[number]["file"]
            _damaged(path, f"token {largest} is outside vocab_size={self.vocab_size}")

    def _map(self, shard: Mapping[str, Any]) -> Tokens:
        """Return the tokens of one shard, ``(rows, block_size)``, without a copy."""
        path = self.folder / shard["file"]
        try:
            _check_size(path, shard["bytes"])
            # Close at once: the mapping stays, and thousands of shards need no descriptors.
            with pa.memory_map(str(path)) as file:
                _require_plain(file)
                with pa.ipc.open_stream(file) as reader:
                    batch = reader.read_next_batch()
            batch.validate()
            column = batch.column(COLUMN)
            values: Any = np.from_dlpack(column.values)  # to_numpy imports pandas
            blocks: Tokens = values.reshape(-1, column.type.list_size)
        except (OSError, pa.ArrowException, KeyError, AttributeError, StopIteration) as error:
            _damaged(path, f"it cannot be read ({error})")
        expected = (shard["rows"], self.block_size)
        if blocks.shape != expected or blocks.dtype != np.dtype(self.manifest["dtype"]):
            _damaged(
                path,
                f"it contains {blocks.shape} {blocks.dtype}, but the manifest says {expected} "
                f"{self.manifest['dtype']}",
            )
        return blocks


def _check_name(folder: Path, split: str, file: str) -> None:
    """Require a shard to be in the folder of its split."""
    home, _, name = file.partition("/")
    if home != split or not name.isprintable() or Path(name).name != name:
        raise UserError(
            f"{folder / 'manifest.json'} is damaged: {file!r:.80} is not a {split} shard; {AGAIN}"
        )


def _require_plain(file: Any) -> None:
    """Raise ArrowInvalid when the first batch in ``file`` is compressed; then rewind ``file``."""
    messages = pa.ipc.MessageReader.open_stream(file)
    messages.read_next_message()  # the schema
    if is_packed(messages.read_next_message().metadata.to_pybytes()):
        raise pa.ArrowInvalid("it is compressed, and cannot be mapped")
    file.seek(0)


def _check_size(path: Path, num_bytes: int) -> os.stat_result:
    try:
        facts = path.stat()
    except FileNotFoundError:
        _damaged(path, "it is missing")
    if facts.st_size != num_bytes:
        _damaged(path, f"it has {facts.st_size} bytes, but the manifest says {num_bytes}")
    return facts


def _damaged(path: Path, what: str) -> NoReturn:
    raise UserError(f"data shard {path} is damaged: {what}; {AGAIN}")
