"""An sshd on each host of tests/helpers/hosts.py, with keys of its own.

    with sshd.on_both(pair, folder) as environment:
        start(..., before=pair.on("h1"), env=environment)     # `ssh h2` and pdsh work there

An `ssh` first on PATH reads the keys from ``folder``; nobody's ~/.ssh is touched.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.hosts import HOSTS, Pair
from tests.ship.needs import SSHD

_CONFIG = """\
User root
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
BatchMode yes
"""


@contextlib.contextmanager
def on_both(pair: Pair, folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons and return environment variables for the processes that use ssh."""
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"{host} {public}\n" for host in HOSTS))
    (folder / "config").write_text(_CONFIG.format(folder=folder))
    real = shutil.which("ssh")
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {real} -F {folder}/config "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines its unprivileged part
    options = {
        "AuthorizedKeysFile": folder / "user.pub",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
    }
    words = [f"-o{name}={value}" for name, value in options.items()]
    command = [SSHD, "-D", "-e", "-f", "/dev/null", "-h", str(folder / "host"), *words]
    daemons = []
    try:
        for host in HOSTS:
            log = (folder / f"{host}.log").open("wb")
            daemons.append(subprocess.Popen([*pair.on(host), *command], stdout=log, stderr=log))
        environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PDSH_RCMD_TYPE": "ssh"}
        for host in HOSTS:
            _until_reached(pair, host, environment)
        yield environment
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(30)


def _until_reached(pair: Pair, host: str, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    asked = [*pair.on("h1"), "ssh", host, "hostname"]
    while True:
        done = subprocess.run(
            asked, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.stdout == f"{host}\n":
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.2)
