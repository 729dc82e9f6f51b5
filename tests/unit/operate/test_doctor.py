"""Each thing that `pmp-ds doctor` checks is broken, and the line that says so is read."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pmp_ds.commands import doctor as command
from pmp_ds.config import Config
from pmp_ds.config.run import RunConfig
from pmp_ds.errors import exit_code
from pmp_ds.operate import checks, rank_checks
from pmp_ds.operate.checks import Here, Outcome
from pmp_ds.operate.doctor import CHECKS, Check, examine, failed, limited, table
from tests.helpers.distributed import free_port
from tests.helpers.forks import Fork
from tests.helpers.stores import write_store


def here(root: Path | str = ".", store: str = "store", **values: object) -> Here:
    config = Config(run=RunConfig(name="x", root=str(root)))
    object.__setattr__(config.data, "store", store)
    return Here(config=config, ds_config={}, **values)  # type: ignore[arg-type]


def failure(outcome: Outcome) -> str:
    assert outcome.state == "FAIL", outcome
    assert outcome.way_out
    return outcome.text


def test_other_versions():
    first = {"torch": "2.11.0", "Python": "3.12.1"}
    found = rank_checks.same_versions({0: first, 1: first, 2: {**first, "torch": "2.10.0"}})
    assert list(found) == [2]
    assert failure(found[2]) == "torch 2.10.0 instead of 2.11.0 as on rank 0"
    mine = checks.versions(here()).value
    assert mine["torch"] == torch.__version__
    assert rank_checks.same_versions({0: mine, 1: mine}) == {}


def test_a_wrong_clock():
    found = rank_checks.same_time({0: 1000.0, 1: 1004.0, 2: 4600.0, 3: 900.0})
    assert failure(found[2]) == "its clock is 3,600 s ahead of rank 0's"
    assert failure(found[3]) == "its clock is 100 s behind rank 0's"
    assert 1 not in found


def test_a_folder_that_cannot_be_written():
    assert failure(rank_checks.shared_folder(here("/proc/x"))) == (
        "/proc cannot be written: No such file or directory"
    )


def test_nothing_is_left_behind(tmp_path: Path):
    assert rank_checks.shared_folder(here(tmp_path / "runs")).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_private_files_open_to_others(tmp_path: Path):
    assert checks.modes(here(tmp_path)).state == "skipped"
    run = here(tmp_path).run
    run.create()
    assert checks.modes(here(tmp_path)).state == "ok"
    (run.init / "key").touch(mode=0o600)
    (run.init / "key").chmod(0o640)
    run.ticket.chmod(0o755)
    found = checks.modes(here(tmp_path))
    assert failure(found) == f"{run.init / 'key'} is open to others (mode 640), and 1 more"
    os.system(found.way_out)
    assert checks.modes(here(tmp_path)).state == "ok"


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert checks.home(here()).state == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)  # of a read-only root
    assert failure(checks.home(here())) == f"{tmp_path / 'hf'} cannot be written"


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch):
    """Docker gives 64 MB, on which NCCL fails."""
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_frsize=4096, f_bavail=(64 << 20) // 4096)
    )
    two = here(hosts=("h", "h"))
    assert checks.shm(two).state == "ok"
    monkeypatch.setattr(checks, "on_gpus", lambda: True)
    assert failure(checks.shm(two)) == "/dev/shm has 67.1 MB free"
    assert checks.shm(here()).state == "ok"


def test_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pmp_ds.optim.kernels import compiler

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    compiler.library.cache_clear()
    try:
        assert "false" in failure(checks.kernel(here()))
    finally:
        compiler.library.cache_clear()


def test_an_interface_that_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    assert failure(checks.interface(here())).startswith("GLOO_SOCKET_IFNAME=none0 does not exist")


def test_a_name_that_leads_to_loopback(monkeypatch: pytest.MonkeyPatch):
    """Debian's /etc/hosts gives a host's own name 127.0.1.1: gloo would listen there."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    two = here(hosts=("h1", "h2"))
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    found = checks.interface(two)
    assert "resolves to 127.0.1.1, where other hosts cannot reach it" in failure(found)
    assert found.way_out == "export GLOO_SOCKET_IFNAME=lo on every host"
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.1")
    assert checks.interface(two).state == "ok"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "on_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert failure(checks.gpu(here(local_rank=2))) == "local rank 2, but 2 GPUs are visible"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pmp_ds.train import dry_run

    assert checks.disk(here(tmp_path)).state == "skipped"
    monkeypatch.setattr(dry_run, "disk_bytes", lambda *_: 10**18)
    found = checks.disk(here(tmp_path, described=True))
    assert failure(found).startswith("1000000000.0 GB for checkpoints and release, ")
    monkeypatch.setattr(dry_run, "disk_bytes", lambda *_: 1)
    assert checks.disk(here(tmp_path, described=True)).state == "ok"


def test_damaged_missing_and_remembered_data(tmp_path: Path):
    folder = write_store(tmp_path / "store", 0, 8, shard=4)
    given = here(tmp_path, folder, described=True)
    assert checks.store(here(tmp_path, folder)).state == "skipped"
    first = limited(checks.store, given)
    assert (first.state, first.text) == (
        "ok",
        "4 shards: 0 verified by an earlier start, 4 intact now",
    )
    shard = sorted((tmp_path / "store/train").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    assert "00000-000.arrow" in failure(limited(checks.store, given))
    assert "does not exist" in failure(
        checks.store(here(tmp_path, str(tmp_path / "none"), described=True))
    )
    found = rank_checks.same_data({0: "a", 1: "a", 2: "b"})
    assert list(found) == [2]


def test_a_check_that_raises_or_hangs():
    began = time.monotonic()
    quick = here(seconds=0.2)
    assert failure(limited(lambda _: 1 // 0, quick)) == "integer division or modulo by zero"  # type: ignore[arg-type, return-value]
    assert failure(limited(lambda _: time.sleep(60), quick)) == "not done within 0.2 s"  # type: ignore[arg-type, return-value]
    assert time.monotonic() - began < 30


def test_the_table(tmp_path: Path):
    """Ranks with the same failure share a line."""
    bad = checks.fail("it is torn", "mend it")
    line = (Check("thing", checks.versions),)
    found = {"thing": {0: checks.ok("fine"), 1: bad, 2: bad, 3: checks.fail("other", "look")}}
    four = here(hosts=("h0", "h1", "h1", "h2"))
    assert table(line, found, four).splitlines() == [
        "FAIL     thing          rank 1 on host h1 and 1 more: it is torn",
        "                        way out: mend it",
        "FAIL     thing          rank 3 on host h2: other",
        "                        way out: look",
    ]
    assert failed(found)
    alone = examine((Check("thing", lambda _: checks.ok("fine")),), here(tmp_path))
    assert table(line, alone, here()) == "ok       thing          fine"
    assert not failed(alone)


def _crash(given: Here) -> Outcome:
    if given.rank == 1:
        os._exit(9)
    return checks.ok("fine")


def _hang(given: Here) -> Outcome:
    if given.rank == 2:
        time.sleep(600)
    return checks.ok("fine")


def _doctor(rank: int, *words: str) -> int:
    chosen = [check for check in CHECKS if check.name in ("clock", "shared folder", "collective")]
    added = [Check("hang", _hang), Check("crash", _crash)]
    return exit_code(lambda: command.main(words, [*chosen, *added]))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[Fork]]:
    """Start three ranks; the last has another folder."""
    (tmp_path / "elsewhere").mkdir()
    job = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    forks = []
    for rank in range(3):
        root = tmp_path / "elsewhere" if rank == 2 else tmp_path
        words = ("--run.root", str(root), "--seconds", "12")
        env = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        forks.append(Fork(_doctor, rank, *words, env=env))
    yield forks
    for fork in forks:
        fork.close()


@pytest.mark.nightly
@pytest.mark.processes
def test_ranks_that_crash_hang_or_see_another_folder(ranks: list[Fork], tmp_path: Path):
    code, out, err = ranks[0].end()
    assert (code, err) == (1, ""), out + err
    host, lines = socket.gethostname(), out.splitlines()
    assert lines[0].startswith("ranks: 3, hosts: 1, which met at 127.0.0.1:")
    assert lines[1].startswith("ok       clock")
    assert lines[2].startswith(f"FAIL     shared folder  rank 2 on host {host}: {tmp_path}/elsewh")
    assert lines[2].endswith("which rank 0 wrote, is not there")
    assert lines[4].startswith("ok       collective     gloo, 4 MB over 3 ranks")
    assert lines[5] == f"FAIL     hang           rank 2 on host {host}: not done within 12 s"
    assert lines[7].startswith(
        f"FAIL     crash          rank 1 on host {host}: no answer within 12"
    )
    assert ranks[2].wait(60) == 0  # though its check still hangs
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere"]


def _doctor_without_end(rank: int, *words: str) -> int:
    added = [Check("clock", rank_checks.clock), Check("crash", _crash), Check("hang", _hang)]
    return exit_code(lambda: command.main(words, added))


@pytest.mark.processes
def test_a_launcher_that_ends_the_others_gets_the_table(tmp_path: Path):
    """Rank 1 crashes; SIGTERM comes long before `--seconds` are over."""
    job = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ("--run.root", str(tmp_path), "--seconds", "600")
    envs = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(3)]
    forks = [Fork(_doctor_without_end, rank, *words, env=envs[rank]) for rank in range(3)]
    assert forks[1].wait(120) == 9  # after the clocks, so that all have begun
    forks[0].send_signal(signal.SIGTERM)
    forks[2].send_signal(signal.SIGTERM)
    code, out, err = forks[0].end()
    assert (code, err) == (1, ""), out + err
    host, lines = socket.gethostname(), out.splitlines()
    assert lines[1].startswith("ok       clock")
    assert lines[2].startswith(
        f"FAIL     crash          rank 1 on host {host}: no answer before the ranks were asked to "
    )
    assert lines[4].startswith(f"FAIL     hang           rank 2 on host {host}: not done before ")
    assert forks[2].wait(60) == 0
    for fork in forks:
        fork.close()


def test_findings_are_json():
    assert json.dumps(checks.versions(here()).value)
