"""A folder that only one job writes to, and that all of its ranks share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pmp_ds import dist, lease, on_fault
from pmp_ds.errors import require


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder`` on rank 0 (lease.py), and check that every rank sees this. Collective.

    Raises UserError that names the holder when another job has it, or the ranks and hosts where
    ``folder`` is not the one that rank 0 sees.
    """
    with contextlib.ExitStack() as stack:

        def take() -> tuple[str, str]:
            mine = stack.enter_context(lease.hold(folder, what))
            return mine.path.name, mine.holder.token

        name, token = dist.on_rank0(take)
        dist.together(
            lambda: require(
                lease.is_seen(folder / name, token),
                f"{what} is not the one that rank 0 writes to: run.root must be one folder "
                "that all hosts of the job share",
            )
        )
        dist.on_rank0(on_fault.forget)
        on_fault.shared()
        yield
