"""Tests in namespaces run only where `unshare` may create them; root in a container often may
not."""

import shutil
import subprocess

import pytest


def needs(*options: str) -> pytest.MarkDecorator:
    """Skip a test unless `unshare` works with ``options``."""
    command = ["unshare", *options, "true"]
    works = (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    return pytest.mark.skipif(not works, reason=f"`{' '.join(command)}` does not work here")
