"""Read and write safetensors files one tensor at a time.

Reading copies instead of mapping, so that file pages do not count as memory of the process. Writing
derives the header from names and shapes alone, so that only one tensor is in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = {"format": "pt"}
_LENGTH = 8  # bytes of the header's length
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile:
    """An open safetensors file. Raises OSError or SafetensorError when it is missing or damaged."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as handle:  # checks the header against the file's size
            self.metadata: dict[str, str] | None = handle.metadata()
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the object
        length = int.from_bytes(self._file.read(_LENGTH), "little")
        self._start = _LENGTH + length
        header: dict[str, Any] = json.loads(self._file.read(length))
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
        tensor = torch.empty(self.shape(name), dtype=DTYPES[self.dtype(name)])
        self._file.seek(self._start + self._header[name]["data_offsets"][0])
        if self._file.readinto(raw_bytes(tensor)) != tensor.nbytes:
            raise OSError(f"{self.path} ends inside {name}")
        return tensor

    def close(self) -> None:
        self._file.close()


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    tensor: Callable[[str], torch.Tensor],
) -> str:
    """Write ``tensor(name)`` for every name, in order, fsynced; return the sha256 (hex).

    Equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # aligns the tensors
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(text).to_bytes(_LENGTH, "little"), text):
            file.write(piece)
            digest.update(piece)
        for name, shape in shapes.items():
            value = tensor(name)
            assert (value.dtype, tuple(value.shape)) == (dtypes[name], shape), name
            file.write(raw_bytes(value))
            digest.update(raw_bytes(value))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, row-major, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
