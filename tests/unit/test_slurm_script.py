"""The SLURM script of docs/OPERATIONS.md, run by bash with stand-ins for `srun` and `scontrol`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    text = (REPO / "docs" / "OPERATIONS.md").read_text()
    (found,) = re.findall(r"```(?:bash)?\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    (tmp_path / "job.sh").write_text(found)
    for name, body in (("srun", "exit $SRUN_CODE"), ("scontrol", 'echo "$*" >> asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "job.sh"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, None, False),
        (1, None, False),
        (2, None, False),
        (75, None, True),
        (70, "3", True),
        (134, None, True),  # SIGABRT
        (135, None, True),  # SIGBUS
        (137, "19", True),
        (139, None, True),  # SIGSEGV
        (143, None, True),  # a second SIGTERM
        (130, None, False),  # Ctrl-C
        (127, None, False),  # no such command
        (75, "20", False),
    ],
)
def test_it_ends_with_the_runs_code(script, code, restarts, requeued):
    environment = os.environ | {
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SRUN_CODE": str(code),
    }
    environment.pop("SLURM_RESTART_COUNT", None)
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = restarts
    done = subprocess.run(["bash", script], env=environment, cwd=script.parent, check=False)
    assert done.returncode == code
    asked = script.parent / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if requeued else "")


def test_the_log_is_not_truncated(script):
    head = script.read_text().split("code=0")[0]
    assert {"--open-mode=append", "--requeue"} <= set(head.split())
