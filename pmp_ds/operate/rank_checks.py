"""Checks in which the ranks take part together. Each waits for the others for a bounded time."""

import contextlib
import datetime
import secrets
import time
from collections.abc import Callable, Mapping

from pmp_ds.errors import UserError
from pmp_ds.operate.checks import Here, Outcome, existing, fail, ok, on_gpus
from pmp_ds.run_dir import eventually

MOST_SKEW = 5.0
"""Seconds between the clocks of two hosts."""

_SEE_SECONDS = 15.0
"""Seconds in which a file of one host must be seen by another."""


def shared_folder(here: Here) -> Outcome:
    """Every rank can write to the folder of the run, and sees what rank 0 writes there."""
    folder, others = existing(here.run.root), range(1, here.world)
    way_out = "run.root must be one folder that all hosts share and this user can write to"
    try:
        mine = folder / f".doctor-{here.rank}-{secrets.token_hex(6)}"
        mine.write_text(mine.name)
    except OSError as error:
        return fail(f"{folder} cannot be written: {error.strerror}", way_out)
    try:
        if here.rank == 0:
            if here.store is not None:
                here.store.set("doctor/shared", str(mine.absolute()))
                with contextlib.suppress(UserError):  # those that do not look say why
                    _await(
                        here, lambda: all(here.store.check([f"doctor/seen/{r}"]) for r in others)
                    )
            return ok(f"{folder} can be written" + (" and is seen by others" if others else ""))
        _await(here, lambda: here.store.check(["doctor/shared"]))
        name = here.store.get("doctor/shared").decode().rpartition("/")[2]
        theirs = folder / name
        seen = eventually(theirs.exists, theirs, min(_SEE_SECONDS, here.seconds / 2))
        here.store.set(f"doctor/seen/{here.rank}", "yes")
        if not seen:
            return fail(f"{theirs}, which rank 0 wrote, is not there", way_out)
        return ok(f"{folder} can be written, and what rank 0 writes is seen")
    finally:
        mine.unlink(missing_ok=True)


def clock(here: Here) -> Outcome:
    """Return this host's time at a moment that all ranks share."""
    if here.store is None:
        return ok("one host")
    if here.rank == 0:
        ready = [f"doctor/clock/{rank}" for rank in range(1, here.world)]
        _await(here, lambda: here.store.check(ready))
        here.store.set("doctor/now", "now")
    else:
        here.store.set(f"doctor/clock/{here.rank}", "ready")
        _await(here, lambda: here.store.check(["doctor/now"]))
    return ok(f"within {MOST_SKEW:g} s of rank 0", time.time())


def same_time(values: Mapping[int, float]) -> dict[int, Outcome]:
    """Return a failure for each rank whose clock differs from rank 0's."""
    reference = values.get(0)
    return {
        rank: fail(
            f"its clock is {abs(value - reference):,.0f} s "
            f"{'ahead of' if value > reference else 'behind'} rank 0's",
            "set the clocks by NTP (chrony): training does without, but logs, times of files and "
            "certificates do not",
        )
        for rank, value in values.items()
        if reference is not None and abs(value - reference) > MOST_SKEW
    }


def same_versions(values: Mapping[int, Mapping[str, str]]) -> dict[int, Outcome]:
    """Return a failure for each rank with other versions than rank 0."""
    first = values.get(0, {})
    found = {}
    for rank, value in values.items():
        differ = [n for n in sorted({*first, *value}) if first.get(n) != value.get(n)]
        if first and differ:
            text = ", ".join(f"{n} {value.get(n)} instead of {first.get(n)}" for n in differ)
            found[rank] = fail(f"{text} as on rank 0", "install the same on every host")
    return found


def same_data(values: Mapping[int, str]) -> dict[int, Outcome]:
    """Return a failure for each rank with other data than rank 0."""
    way_out = "copy or mount the store of rank 0's host there"
    return {
        rank: fail("its data.store has other data than rank 0's", way_out)
        for rank, value in values.items()
        if 0 in values and value != values[0]
    }


def collective(here: Here) -> Outcome:
    """The sum of a number of every rank arrives everywhere, over NCCL or gloo."""
    import torch
    import torch.distributed as torch_dist

    cuda = on_gpus()
    device = torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = torch_dist.HashStore() if here.store is None else here.store.clone()
    began = time.monotonic()
    torch_dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=torch_dist.PrefixStore("doctor/group", store),
        rank=here.rank,
        world_size=here.world,
        timeout=datetime.timedelta(seconds=max(0.2 * here.seconds, here.patience)),
        device_id=device if cuda else None,
    )
    numbers = torch.full((1 << 20,), float(here.rank + 1), device=device)
    torch_dist.all_reduce(numbers)
    wanted = here.world * (here.world + 1) / 2
    right = bool((numbers == wanted).all())
    torch_dist.destroy_process_group()
    if not right:
        return fail(
            f"the sum over ranks is {numbers[0].item():g}, not {wanted:g}", "check the links"
        )
    version = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if cuda else "gloo"
    seconds = time.monotonic() - began
    return ok(f"{version}, 4 MB over {here.world} ranks in {seconds:.1f} s, the right sum")


def _await(here: Here, there: Callable[[], bool]) -> None:
    """Wait for other ranks. Raises UserError when they do not come."""
    seconds = here.patience
    until = time.monotonic() + seconds
    while not there():
        if time.monotonic() > until:
            raise UserError(f"other ranks did not take part within {seconds:.0f} s")
        time.sleep(0.002)
