"""Print requirements.lock: what the image installs, with the hash of every file.

    python -m tests.helpers.lock > requirements.lock      # make lock; needs uv

uv resolves the runtime dependencies of pyproject.toml with the versions of constraints.txt. torch
and what comes with it (Triton, CUDA) are left out: the base image has them.
"""

import re
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HEADER = """\
# What the image installs, with the hash of every file: the runtime part of constraints.txt without
# torch and what comes with it (Triton, CUDA), which the base image or TORCH_INDEX provides.
# After a change of constraints.txt or of the dependencies: make lock
"""
OF_TORCH = re.compile(r"^(torch|triton|cuda-[\w-]+|nvidia-[\w-]+)==", re.MULTILINE)


def main() -> None:
    omitted = OF_TORCH.findall((REPO / "constraints.txt").read_text(encoding="utf-8"))
    command = ["uv", "pip", "compile", "--quiet", "pyproject.toml", "--universal"]
    command += ["--constraint=constraints.txt", "--python-version=3.11", "--generate-hashes"]
    command += ["--no-annotate", "--no-header", *(f"--no-emit-package={name}" for name in omitted)]
    print(HEADER, end="")
    print(
        subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True).stdout,
        end="",
    )


if __name__ == "__main__":
    main()
