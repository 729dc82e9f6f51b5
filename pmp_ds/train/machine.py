"""The machine that a dry run is about, as a user describes it."""

import re
from dataclasses import dataclass

from pmp_ds.errors import require

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {f"{unit[0]}iB": 1024**i for i, unit in enumerate(_UNITS, start=1)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the run would take place; bytes and FLOP/s of one rank."""

    world: int = 1
    device_memory: int | None = None
    host_memory: int | None = None
    device_flops: float | None = None
    mfu: float = 0.4
    block_size: int | None = None
    """Tokens, where there is no store yet."""

    def __post_init__(self) -> None:
        require(self.world >= 1, f"--world-size {self.world} must be at least 1")
        require(0.0 < self.mfu <= 1.0, f"--mfu {self.mfu} must be in (0, 1]")
        size = self.block_size
        require(size is None or size >= 2, f"--block-size {size} must be at least 2")


def bytes_of(text: str | None, flag: str) -> int | None:
    """Return the bytes of `80GB` or `75GiB`; None of None. Raises UserError without a unit."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]i?B)", text.strip())
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    require(size > 0, f"{flag} {text!r} is not a size: write a number and a unit, such as 80GB")
    return size


def flops_of(text: str | None, flag: str) -> float | None:
    """Return the FLOP/s of `989T` or `1.98P`; None of None. Raises UserError without a unit."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*([TP])(?:FLOPS|FLOP/s)?", text.strip())
    rate = float(match[1]) * {"T": 1e12, "P": 1e15}[match[2]] if match else 0.0
    require(rate > 0, f"{flag} {text!r} is not a rate: write a number and T or P, such as 989T")
    return rate
