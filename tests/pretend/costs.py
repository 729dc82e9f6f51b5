"""What an update costs the host and the device, by configuration: measured, and held by
test_jobs.py. `python -m tests.pretend` measures anew."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from tests.pretend.job import Measured, Setup


@dataclass(frozen=True, repr=False)
class Costs:
    """Of the rank that has the highest."""

    waits: int
    """In an update of masked pretraining that logs nothing: of the host, for a device that has
    nothing else to do meanwhile."""
    discovery_waits: int
    """In an update of discovery."""
    launches: int
    """Of kernels in the optimizer phase, from the last gradient to the next forward pass."""
    bytes_per_parameter: float
    """That the optimizer phase reads and writes on the device."""
    peak_per_parameter: float
    """The most bytes of tensors on the device in the optimizer phase."""

    @classmethod
    def of(cls, ranks: Sequence[Measured]) -> "Costs":
        one = ranks[0]
        return cls(
            waits=max(len(rank.training.waits) for rank in ranks),
            discovery_waits=max(len(rank.discovery.waits) for rank in ranks),
            launches=max(rank.training.step_launches for rank in ranks),
            bytes_per_parameter=_rounded(
                max(rank.training.step_bytes for rank in ranks) / one.num_params
            ),
            peak_per_parameter=_rounded(
                max(rank.training.peak_bytes - rank.bytes_before for rank in ranks) / one.num_params
            ),
        )

    def __repr__(self) -> str:
        return f"Costs({', '.join(map(str, astuple(self)))})"

    def within(self, written: "Costs") -> bool:
        """Whether these are the written ones, to a hundredth where they count bytes."""
        return (
            (self.waits, self.discovery_waits, self.launches)
            == (written.waits, written.discovery_waits, written.launches)
            and abs(self.bytes_per_parameter - written.bytes_per_parameter) < 0.3
            and abs(self.peak_per_parameter - written.peak_per_parameter) < 0.3
        )


def _rounded(bytes_per_parameter: float) -> float:
    return round(bytes_per_parameter, 1)


def table(costs: dict[Setup, Costs]) -> str:
    """Return Markdown for docs/PERFORMANCE.md."""
    head = ["", "waits", "in discovery", "launches", "bytes per parameter", "peak"]
    rows = [head, ["---"] * len(head)]
    for setup, one in costs.items():
        rows.append([str(setup), *map(str, astuple(one))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


QUICK = (
    Setup(stage=2),
    Setup(stage=2, precision="fp16", ranks=2),
    Setup(stage=3, ranks=2),
)
"""What `make test` runs; `make nightly` runs all."""

COSTS = {
    Setup(stage=0, precision="fp32"): Costs(0, 3, 26, 22.8, 14.3),
    Setup(stage=0): Costs(0, 3, 26, 21.4, 14.3),
    Setup(stage=1): Costs(0, 3, 26, 21.4, 14.2),
    Setup(stage=1, layers=22): Costs(0, 3, 26, 21.4, 14.3),
    Setup(stage=2): Costs(0, 3, 26, 21.4, 14.2),
    Setup(stage=2, precision="fp32"): Costs(0, 3, 26, 25.6, 18.2),
    Setup(stage=2, precision="fp16"): Costs(1, 5, 31, 21.4, 14.2),
    Setup(stage=2, master="compact"): Costs(0, 3, 26, 21.4, 13.0),
    Setup(stage=2, master="split"): Costs(0, 3, 26, 20.0, 11.6),
    Setup(stage=2, master="split", moments="bf16"): Costs(0, 3, 26, 14.4, 8.8),
    Setup(stage=2, moments="int8"): Costs(0, 3, 26, 13.0, 10.0),
    Setup(stage=2, offload=True): Costs(0, 1, 2, 2.0, 2.5),
    Setup(stage=3): Costs(0, 3, 26, 21.4, 15.0),
    Setup(stage=3, precision="fp16"): Costs(1, 5, 31, 21.4, 15.0),
    Setup(stage=3, offload=True): Costs(0, 1, 2, 2.0, 2.8),
    Setup(stage=0, ranks=2): Costs(0, 3, 26, 21.4, 14.4),
    Setup(stage=1, ranks=2): Costs(0, 3, 29, 17.4, 8.4),
    Setup(stage=2, ranks=2): Costs(0, 3, 29, 17.5, 8.4),
    Setup(stage=2, precision="fp16", ranks=2): Costs(1, 5, 34, 17.5, 8.4),
    Setup(stage=2, ranks=2, layers=22): Costs(0, 3, 29, 17.4, 8.3),
    Setup(stage=2, ranks=2, offload=True): Costs(0, 1, 4, 7.0, 2.5),
    Setup(stage=2, precision="fp16", ranks=2, offload=True): Costs(0, 1, 4, 7.0, 2.5),
    Setup(stage=1, ranks=2, overlap=True): Costs(0, 3, 29, 17.5, 8.4),
    Setup(stage=2, ranks=2, overlap=True): Costs(0, 3, 29, 17.5, 8.4),
    Setup(stage=2, precision="fp32", ranks=2, overlap=True): Costs(0, 3, 29, 25.7, 11.4),
    Setup(stage=2, ranks=2, overlap=True, accumulate_fp32=True): Costs(0, 3, 29, 19.0, 9.4),
    Setup(stage=2, ranks=2, offload=True, overlap=True): Costs(0, 1, 4, 7.0, 2.5),
    Setup(stage=3, ranks=2): Costs(0, 3, 34, 11.3, 8.3),
    Setup(stage=3, precision="fp16", ranks=2): Costs(1, 5, 39, 11.3, 8.3),
    Setup(stage=3, ranks=2, master="compact"): Costs(0, 3, 34, 11.3, 7.8),
    Setup(stage=3, ranks=2, offload=True): Costs(0, 1, 9, 1.0, 1.8),
    Setup(stage=3, ranks=2, layers=22): Costs(0, 3, 74, 10.8, 7.6),
}
