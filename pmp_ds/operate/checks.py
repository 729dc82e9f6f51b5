"""What `pmp-ds doctor` checks on a rank: one function for each, which returns an Outcome.

A function may raise, crash or hang: doctor.py reports that too. Those that need other ranks are in
rank_checks.py.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.run_dir import RunDir, loose
from pmp_ds.version import code_version

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
_LEAST_SHM = 1 << 30  # bytes, for several GPUs of a host: NCCL's buffers
_STORE_SECONDS = 10.0  # of hashing


@dataclass(frozen=True)
class Outcome:
    """The result of a check on one rank."""

    state: Literal["ok", "FAIL", "skipped"]
    text: str
    way_out: str = ""
    value: Any = None
    """What must agree on all ranks, as JSON."""


@dataclass
class Asked:
    """When this rank was asked to end, as `time.monotonic`."""

    at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Here:
    """This rank, and the run that it would train."""

    config: Config
    ds_config: Mapping[str, Any]
    described: bool = False
    """Whether settings were given: without them nothing is known of model and data."""

    rank: int = 0
    local_rank: int = 0
    hosts: tuple[str, ...] = ()
    """Host of every rank."""

    store: Any = None
    """torch's store where the ranks met, for this thread alone; None for a single rank."""

    seconds: float = 60.0
    """Longest time of a check."""

    began: float = field(default_factory=time.monotonic)
    asked: Asked = field(default_factory=Asked)

    @property
    def patience(self) -> float:
        """Seconds left to wait for ranks that do not take part."""
        return max(3.0, self.began + 0.7 * self.seconds - time.monotonic())

    @property
    def world(self) -> int:
        return max(1, len(self.hosts))

    @property
    def ranks_of_host(self) -> int:
        return self.hosts.count(self.hosts[self.rank]) if self.hosts else 1

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run.root) / self.config.run.name)


def ok(text: str, value: Any = None) -> Outcome:
    return Outcome("ok", text, value=value)


def fail(text: str, way_out: str) -> Outcome:
    return Outcome("FAIL", text, way_out)


def skipped(text: str) -> Outcome:
    return Outcome("skipped", text)


def existing(folder: Path) -> Path:
    """Return ``folder``, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def on_gpus() -> bool:
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def versions(_: Here) -> Outcome:
    """Of Python, the packages that decide about bits, and this code."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    found["pmp-ds"] = str(code_version()).removeprefix("pmp-ds ")
    return ok(", ".join(f"{name} {version}" for name, version in found.items()), found)


def disk(here: Here) -> Outcome:
    """Room for the run's checkpoints and release."""
    folder = existing(here.run.root)
    free = shutil.disk_usage(folder).free
    if not here.described:
        return skipped(f"{_size(free)} free at {folder}; what a run needs: add --config")
    from pmp_ds.train.dry_run import disk_bytes

    needed = disk_bytes(here.config, dict(here.ds_config), here.world)
    there = sum(p.stat().st_size for p in here.run.checkpoints.rglob("*") if p.is_file())
    text = f"{_size(needed)} for checkpoints and release, {_size(free + there)} at {folder}"
    if needed > free + there:
        way_out = (
            "make room, set run.root to another disk, or keep fewer checkpoints: run.keep_last, "
            "run.keep_every"
        )
        return fail(text, way_out)
    return ok(text)


def shm(here: Here) -> Outcome:
    """Shared memory, which NCCL uses between the GPUs of a host."""
    found = os.statvfs("/dev/shm")
    text = f"/dev/shm has {_size(found.f_frsize * found.f_bavail)} free"
    if not (on_gpus() and here.ranks_of_host > 1):
        return ok(f"{text}; only several GPUs of a host need it")
    if found.f_frsize * found.f_bavail < _LEAST_SHM:
        way_out = (
            f"{_size(_LEAST_SHM)} at least: docker run --shm-size 8g; Kubernetes: an emptyDir with "
            "medium Memory at /dev/shm"
        )
        return fail(text, way_out)
    return ok(text)


def kernel(_: Here) -> Outcome:
    """The C++ update, compiled before or now."""
    from pmp_ds.optim.kernels import compiler

    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library = compiler.library()
    if library is None:
        reason = str(caught[-1].message) if caught else "it cannot be loaded"
        return fail(reason, "install g++, or run where a kernel was compiled before (the image)")
    return ok(f"{library._name}, in {time.monotonic() - began:.1f} s")


def interface(here: Here) -> Outcome:
    """The address by which other hosts reach this one."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    known = psutil.net_if_addrs()
    if named is not None and named not in known:
        there = ", ".join(sorted(known))
        return fail(f"GLOO_SOCKET_IFNAME={named} does not exist; there are {there}", "name one")
    if len(set(here.hosts)) < 2:
        return skipped("one host")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        address = probe.getsockname()[0]
    names = [n for n, found in known.items() if address in {one.address for one in found}]
    if named is not None:
        return ok(f"GLOO_SOCKET_IFNAME={named}; {address} reaches rank 0")
    try:
        resolved = socket.gethostbyname(socket.gethostname())
    except OSError:
        resolved = "nothing"
    if resolved.startswith("127.") or resolved == "nothing":
        way_out = f"export GLOO_SOCKET_IFNAME={names[0] if names else 'eth0'} on every host"
        host = socket.gethostname()
        return fail(f"{host} resolves to {resolved}, where other hosts cannot reach it", way_out)
    return ok(f"{', '.join(names)} ({address})")


def modes(here: Here) -> Outcome:
    """Nobody else can read what is private."""
    private = here.run.private
    if not private.exists():
        return skipped(f"{private} does not exist yet")
    if found := loose(private):
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        return fail(found[0].partition(": chmod")[0] + more, f"chmod -R go-rwx {private}")
    return ok(f"{private} is closed to others")


def gpu(here: Here) -> Outcome:
    """This rank's GPU computes."""
    import torch

    if not on_gpus():
        if os.environ.get("DS_ACCELERATOR") != "cpu" and Path("/dev/nvidia0").exists():
            made = torch.version.cuda or "no CUDA"
            way_out = "update the driver, or install the torch build for its CUDA version"
            return fail(f"there is a GPU, but torch (made for {made}) cannot use it", way_out)
        return skipped("none: ranks compute on the CPU")
    count = torch.cuda.device_count()
    if here.local_rank >= count:
        way_out = "start one rank per GPU (python -m pmp_ds.launch does)"
        return fail(f"local rank {here.local_rank}, but {count} GPUs are visible", way_out)
    device = torch.device("cuda", here.local_rank)
    ones = torch.ones(64, 64, device=device)
    if not bool((ones @ ones == 64).all()):
        return fail(f"{torch.cuda.get_device_name(device)} computes wrongly", "exchange it")
    facts = torch.cuda.get_device_properties(device)
    return ok(
        f"{facts.name}, {_size(facts.total_memory)}, CUDA {torch.version.cuda}, driver {_driver()}"
    )


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else "unknown"


def store(here: Here) -> Outcome:
    """The data are the same on every host; rank 0 hashes shards that nobody did, for a while."""
    from pmp_ds.data.mixed_store import open_data
    from pmp_ds.data.verified import not_remembered

    given = here.config.data.store
    if not here.described:
        return skipped("add --data.store, or --config")
    try:
        data = open_data(given)
        left = not_remembered(data, here.run.verified)
    except UserError as error:
        return fail(str(error), "name it with --data.store, or prepare it with pmp-ds prepare-data")
    total = sum(len(one.shards) for one in data.stores)
    if here.rank != 0:
        return ok(f"{total} shards", data.dataset_id)
    until, hashed = time.monotonic() + _STORE_SECONDS, 0
    for one, number in left:
        if time.monotonic() > until:
            break
        one.check_shard(number)
        hashed += 1
    before, after = total - len(left), len(left) - hashed
    text = f"{total} shards: {before} verified by an earlier start, {hashed} intact now"
    return ok(text + (f", {after} left to the start" if after else ""), data.dataset_id)


def home(_: Here) -> Outcome:
    """The folder where Hugging Face libraries keep what they load."""
    folder = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    there = existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return fail(f"{folder} cannot be written", "export HF_HOME=/a/folder/that/can")
    return ok(f"{folder} can be written")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
