"""Two hosts on this machine: network namespaces of their own, joined by a bridge in a third one.

    with hosts.two() as pair:
        start(..., before=pair.on("h1"))      # a command on host h1
        pair.cut("h2")                        # unplugs its cable; `join` plugs it in again

The bridge's namespace is a third host, `ctl`, that no cut reaches. The hosts know each other's
names. Needs root and iproute2. They have no route out, and nothing of the machine is changed.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOSTS = {"h1": "10.213.7.1", "h2": "10.213.7.2"}
CONTROL = {"ctl": "10.213.7.254"}
TOOLS = ("ip", "nsenter", "unshare", "hostname")


def missing() -> str | None:
    """Return the reason why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"needs {absent[0]} (Debian: iproute2, util-linux, hostname)"
    name = f"pmp-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Pair:
    """Hold hosts h1, h2 and ctl."""

    prefix: str
    names: Path
    """Their /etc/hosts."""

    def on(self, host: str) -> list[str]:
        """Return the command prefix that runs a command on a host, under its name, without a new
        process."""
        namespace = f"{self.prefix}-{'sw' if host in CONTROL else host}"
        enter = ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--mount"]
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        return [*enter, "sh", "-c", script, host, str(self.names)]

    def cut(self, host: str) -> None:
        """Drop all packets of a host; its own interface notices nothing."""
        _ip("-n", f"{self.prefix}-sw", "link", "set", host, "down")

    def join(self, host: str) -> None:
        _ip("-n", f"{self.prefix}-sw", "link", "set", host, "up")


@contextlib.contextmanager
def two() -> Iterator[Pair]:
    prefix = f"pmp-{secrets.token_hex(3)}"
    switch = f"{prefix}-sw"
    names = [switch, *(f"{prefix}-{host}" for host in HOSTS)]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, names)
        known = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hosts"
        lines = [f"{address} {host}" for host, address in {**HOSTS, **CONTROL}.items()]
        known.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        _ip("-n", switch, "addr", "add", f"{CONTROL['ctl']}/24", "dev", "bridge")
        for host, address in HOSTS.items():
            own = f"{prefix}-{host}"
            cable = f"link add {host} type veth peer name eth0 netns {own}"
            _ip("-n", switch, *cable.split())
            _ip("-n", switch, "link", "set", host, "master", "bridge", "up")
            _ip("-n", own, "link", "set", "eth0", "up")
            _ip("-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
        yield Pair(prefix, known)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
