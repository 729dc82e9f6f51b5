"""Check machines before a run: start it as the run, on every rank, or alone.

    pmp-ds doctor
    python -m pmp_ds.launch doctor --config demo --deepspeed-config zero2
    deepspeed launcher/doctor.py --config tinyllama-1.1b --data.store tokenized_data/corpus
    srun pmp-ds doctor --config tinyllama-1.1b

Takes the options of `pmp-ds pretrain`, trains nothing and leaves nothing behind. Prints a line for
each check: versions, clocks, the shared folder, modes of private/, caches, /dev/shm, the kernel,
the network interface, GPU and driver, a collective, room on the disk, the data. Each failure names
rank, host and the way out. Exit code 1 if a check fails, also one that crashes or hangs on a rank:
that is said after about twice --seconds, or when the launcher ends the ranks.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmp_ds import launchers, signals
from pmp_ds.cli import parse
from pmp_ds.commands import OnRanks
from pmp_ds.config import Config
from pmp_ds.errors import EXIT_MISTAKE, SharedError, UserError, as_rank, exit_code, require

if TYPE_CHECKING:
    from pmp_ds.meeting import Meeting
    from pmp_ds.operate.doctor import Check


@dataclass(frozen=True, kw_only=True)
class Options(OnRanks):
    """How long."""

    seconds: float = 60.0
    """Longest time to wait for the ranks, and of each check."""

    def __post_init__(self) -> None:
        require(self.seconds >= 5, f"--seconds {self.seconds} must be at least 5")


def main(argv: Sequence[str] | None = None, table: "Sequence[Check] | None" = None) -> None:
    """Check with ``table``, all checks by default. Raises SystemExit(1) if one fails."""
    as_rank()
    argv = sys.argv[1:] if argv is None else argv
    config, options = parse(
        Config, argv, prog="pmp-ds doctor", description=__doc__, options=Options
    )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launchers.adopt()
    from pmp_ds.engine import deepspeed_config
    from pmp_ds.operate import doctor
    from pmp_ds.operate.checks import Here

    world = int(os.environ.get("WORLD_SIZE", "1"))
    met: Meeting | None = None
    mistake: str | None = None
    ds_config: dict[str, Any] = {}
    try:
        ds_config = deepspeed_config.read_json(options.deepspeed_config)
    except UserError as error:
        mistake = str(error)
    if world > 1:
        met = _meet(mistake, options.seconds)
    elif mistake is not None:
        raise UserError(mistake)
    here = Here(
        config=config,
        ds_config=ds_config,
        described=any(word.startswith(("--config", "--data", "--model")) for word in argv),
        rank=met.rank if met else 0,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        hosts=met.hosts if met else (),
        store=met.store if met else None,
        seconds=options.seconds,
    )
    table = doctor.CHECKS if table is None else table

    def end(_: object) -> None:
        here.asked.at = time.monotonic()

    with signals.reacting(end):
        found = doctor.examine(table, here)
    if here.rank != 0:
        _leave(0)
        return
    ranks, hosts = here.world, len(set(here.hosts)) or 1
    place = f", which met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" if met else ""
    print(f"ranks: {ranks}, hosts: {hosts}{place}")
    print(doctor.table(table, found, here), flush=True)
    if doctor.failed(found):
        _leave(EXIT_MISTAKE)
        raise SystemExit(EXIT_MISTAKE)


def _leave(code: int) -> None:
    """End the process where a check still hangs, perhaps in the kernel, which nothing can end."""
    from pmp_ds.operate.doctor import THREAD

    if any(thread.name == THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)


def _meet(mistake: str | None, seconds: float) -> "Meeting":
    """Meet the other ranks. A rank that finds nobody says so itself."""
    from pmp_ds.meeting import meet

    try:
        return meet("doctor", mistake, seconds)
    except SharedError:
        raise
    except UserError as error:
        if os.environ["RANK"] != "0":
            print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        raise


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds doctor` on this rank and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
