"""Read optimizer state from a checkpoint's files, written by any number of ranks."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from pmp_ds.errors import UserError
from pmp_ds.state.manifest import DamagedError
from pmp_ds.ticket.mask import ParamMask, check_bits, unpack

_MASKS_FILE = "state/masks.safetensors"
_DTYPES = ("F32", "BF16", "I16")  # BF16: moments in fewer bits; I16: the lower bits of a master

Kept = Callable[[str, int, int], torch.Tensor]


class StateReader:
    """Reads runs of elements from the state files of all ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob("state/rank-*"))]
        self._parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensor, first = key.rsplit("/", 1)
                self._parts[tensor].append((int(first), number))
        for parts in self._parts.values():
            parts.sort()

    @property
    def kinds(self) -> set[str]:
        """The kinds of state: moments, fp32 master weights, scores."""
        return {part.partition("/")[0] for part in self._parts}

    def read(self, kind: str, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements [first, first + count) of parameter ``name``, (count,) fp32, or int16 for
        the lower bits of master weights. For moments and master weights, only kept elements are
        numbered; for scores, all."""
        parts = self._parts[f"{kind}/{name}"]
        pieces = []
        while count:
            start, number = parts[bisect_right(parts, first, key=lambda part: part[0]) - 1]
            stored = self._files[number].get_slice(f"{kind}/{name}/{start}")
            dtype, dimensions = stored.get_dtype(), len(stored.get_shape())
            if dtype not in _DTYPES or dimensions != 1:
                raise DamagedError(
                    self._folder, f"{kind} of {name} is {dtype} in {dimensions} dimensions"
                )
            piece = stored[first - start : first - start + count]
            if not piece.numel():
                raise DamagedError(self._folder, f"{kind} of {name} ends before element {first}")
            pieces.append(piece.float() if piece.is_floating_point() else piece)
            first, count = first + piece.numel(), count - piece.numel()
        return torch.cat(pieces) if pieces else torch.empty(0)

    def candidate(self, which: str, shapes: Mapping[str, tuple[int, ...]]) -> Kept | None:
        """Return a candidate mask of discovery on the parameters of ``shapes``, as a function from
        (name, start, count) to (count,) bool, or None if there is none. Raises DamagedError, also
        when called, when it is not a mask of this model."""
        if which in self.kinds:
            return partial(self._bits, which, shapes)
        older = self._older_candidate(which, shapes)
        return None if older is None else older.fragment

    def _bits(
        self,
        which: str,
        shapes: Mapping[str, tuple[int, ...]],
        name: str,
        start: int,
        count: int,
    ) -> torch.Tensor:
        parts, pieces = self._parts[f"{which}/{name}"], []
        ends = [first for first, _ in parts[1:]] + [math.prod(shapes[name])]
        for (first, number), end in zip(parts, ends, strict=False):
            low, high = max(start, first), min(start + count, end)
            if low < high:
                stored = self._files[number].get_tensor(f"{which}/{name}/{first}")
                try:
                    check_bits(stored, end - first, f"{which} of {name}")
                except UserError as error:
                    raise DamagedError(self._folder, str(error)) from None
                pieces.append(unpack(stored, high - low, low - first))
        kept = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.bool)
        if kept.numel() != count:
            raise DamagedError(self._folder, f"{which} of {name} has a gap")
        return kept

    def _older_candidate(
        self, which: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> ParamMask | None:
        """Return a candidate as format 4 and older have it: whole, in a file of its own."""
        path, prefix, bits = self._folder / _MASKS_FILE, f"{which}/", {}
        if path.exists():
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    if key.startswith(prefix):
                        bits[key.removeprefix(prefix)] = file.get_tensor(key)
        if not bits:
            return None
        try:
            return ParamMask(bits=bits, shapes=shapes)
        except UserError as error:
            raise DamagedError(self._folder, f"{_MASKS_FILE}: {error}") from None
