"""What the tests of this folder need of a machine.

    python -m tests.ship.needs slurm      exit code 2 and one line when something is missing

Tests that find something missing are skipped with that line; the make targets end with it instead.
"""

import importlib.util
import os
import shutil
import sys

import pytest

from tests.helpers import hosts

TOOLS = {
    "image": {
        "buildah": "buildah",
        "podman": "podman",
        "runc": "runc",
        "mmdebstrap": "mmdebstrap",
        "newuidmap": "uidmap",
    },
    "slurm": {
        "slurmctld": "slurmctld",
        "slurmd": "slurmd",
        "sbatch": "slurm-client",
        "munged": "munge",
    },
    "hosts": {"pdsh": "pdsh", "ssh": "openssh-client", "gcc": "gcc"},
}
"""Programs, and the Debian packages that have them."""

SSHD = "/usr/sbin/sshd"


def missing(target: str) -> str | None:
    """Return what ``target`` (image, slurm, hosts, manifests) lacks here, or None."""
    if target == "manifests":
        found = importlib.util.find_spec("kubernetes_validate")
        return None if found else "needs kubernetes-validate (pip install kubernetes-validate)"
    if os.geteuid() != 0:
        return "needs root"
    absent = {tool: package for tool, package in TOOLS[target].items() if not _has(tool)}
    if target == "hosts" and not os.path.exists(SSHD):
        absent["sshd"] = "openssh-server"
    if absent:
        return f"needs {', '.join(absent)} (Debian: apt install {' '.join(absent.values())})"
    return None if target == "image" else hosts.missing()


def mark(target: str) -> pytest.MarkDecorator:
    """Skip a test where something is missing, and name it."""
    reason = missing(target)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def _has(tool: str) -> bool:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


def main() -> None:
    target = sys.argv[1]
    if reason := missing(target):
        print(f"error: make test-{target} {reason}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
