"""`nodes.pack` and `nodes.finish` as steps of a datatrove pipeline: local, SLURM or Ray executors.

    pip install -e '.[cluster]'

    pack = SlurmPipelineExecutor([PackUnits("tokenized_data/big")], tasks=64, ...)
    SlurmPipelineExecutor([FinishStore("tokenized_data/big")], tasks=1, depends=pack, ...).run()

As with any scheduler, plan first. An executor skips tasks that its ``logging_dir`` records as
complete, so a new plan needs a new one.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from pmp_ds.prepare import nodes


class PackUnits(PipelineStep):
    """Task ``rank`` of ``world_size`` packs its share of the units; documents pass unchanged."""

    name = "pack units"
    type = "pmp-ds"

    def __init__(self, out: str | Path, workers: int | None = None) -> None:
        """Use ``workers`` processes per task; None: as planned, or one per core."""
        super().__init__()
        self.out, self.workers = Path(out), workers

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        share = nodes.pack(self.out, rank, world_size, self.workers)
        self.stat_update("units", value=share.packed, unit="task")
        self.stat_update("bytes", value=share.num_bytes, unit="task")


class FinishStore(PipelineStep):
    """A single task after all ``PackUnits``: the store gets its manifest and its name."""

    name = "finish store"
    type = "pmp-ds"

    def __init__(self, out: str | Path) -> None:
        super().__init__()
        self.out = Path(out)

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        if rank == 0:
            summary = nodes.finish(self.out)
            self.stat_update("tokens", value=summary.tokens, unit="task")
