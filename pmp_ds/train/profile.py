"""A trace of a few updates, for https://ui.perfetto.dev or chrome://tracing."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from pmp_ds import dist
from pmp_ds.run_dir import RunDir, atomic_path


class Profile:
    """Records what rank 0 does in the updates ``first`` to ``last`` of one phase. Neither shapes
    nor memory are recorded: they would tell how much of a tensor is in the ticket."""

    def __init__(self, run: RunDir, phase: str, updates: tuple[int, int] | None) -> None:
        self._path = run.profile / f"{phase}.json"
        self._updates = updates if dist.rank() == 0 else None
        self._running: Any = None

    def begin(self, step: int) -> None:
        """Start before update ``first``, and end before the one after ``last``."""
        if self._updates is None:
            return
        first, last = self._updates
        if step == first:
            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=kinds)
            self._running.__enter__()
        elif step > last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is under way."""
        running, self._running = self._running, None
        if running is None:
            return
        running.__exit__(None, None, None)
        self._path.parent.mkdir(exist_ok=True)
        with atomic_path(self._path) as temporary:
            running.export_chrome_trace(str(temporary))
        print(f"trace of updates: {self._path} (open it at https://ui.perfetto.dev)", flush=True)
