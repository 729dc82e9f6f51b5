"""Read and write safetensors files one tensor at a time.

Reading copies instead of mapping, so that file pages do not count as memory of the process. Writing
derives the header from names and shapes alone, so that only one tensor is in memory.
"""

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TRAINED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = TRAINED | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
METADATA = {"format": "pt"}
_LENGTH = 8  # bytes of the header's length
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """An open safetensors file; several threads may read it. Raises OSError or SafetensorError when
    it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as handle:  # checks the header against the file's size
            self.metadata: dict[str, str] | None = handle.metadata()
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close: Callable[[], Any] = weakref.finalize(self, os.close, self._fd)
        length = int.from_bytes(os.pread(self._fd, _LENGTH, 0), "little")
        self._start = _LENGTH + length
        header: dict[str, Any] = json.loads(os.pread(self._fd, length, _LENGTH))
        header.pop("__metadata__", None)
        self._header = header

    @property
    def names(self) -> list[str]:
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        """Return the dtype in the file's spelling, such as `BF16`."""
        return str(self._header[name]["dtype"])

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor of a dtype in DTYPES."""
        shape = self.shape(name)
        return self.part(name, 0, math.prod(shape)).view(shape)

    def part(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return a copy of elements [start, start + count), row-major, of one tensor, (count,)."""
        assert 0 <= start <= start + count <= math.prod(self.shape(name)), name
        tensor = torch.empty(count, dtype=DTYPES[self.dtype(name)])
        offset = self._start + self._header[name]["data_offsets"][0] + start * tensor.itemsize
        buffer, done = raw_bytes(tensor), 0
        while done < tensor.nbytes:  # Linux reads 2 GB at most
            read = os.preadv(self._fd, [buffer[done:]], offset + done)
            if not read:
                raise OSError(f"{self.path} ends inside {name}")
            done += read
        return tensor


def encode(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], torch.Tensor],
) -> Iterator[bytes | memoryview]:
    """Yield the content of a file with ``tensor(name)`` for every name, in order.

    Equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # aligns the tensors
    yield len(text).to_bytes(_LENGTH, "little") + text
    for name, shape in shapes.items():
        value = tensor(name)
        assert (value.dtype, tuple(value.shape)) == (dtypes[name], shape), name
        yield raw_bytes(value)


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], torch.Tensor],
) -> str:
    """Write what ``encode`` yields, fsynced; return the sha256 (hex)."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in encode(shapes, dtypes, tensor):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, row-major, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
