"""A name and a home for a user who has neither, as under `docker run --user 12345`.

Python's getpass, torch and the caches of Hugging Face, Triton and DeepSpeed look both up, some of
them when they are imported: pmp_ds/__init__.py calls ``complete`` before anything else. Child
processes inherit both.
"""

import contextlib
import getpass
import os
import stat
import tempfile
from pathlib import Path


def complete() -> None:
    """Set LOGNAME and USER where the user has no name, and HOME where `~` leads nowhere."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["LOGNAME"] = os.environ["USER"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        with contextlib.suppress(OSError):
            os.environ["HOME"] = str(temporary_folder())


def temporary_folder() -> Path:
    """Return a folder of this user alone, the same one for every process where possible.

    Programs are cached in it, so one that another user could write to is never taken.
    """
    folder = Path(tempfile.gettempdir()) / f"pmp_ds-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    ours = is_private(folder)
    return folder if ours else Path(tempfile.mkdtemp(prefix="pmp_ds-"))


def is_private(folder: Path) -> bool:
    """Whether ``folder`` is one of this user, not a link to one, and nobody else may look in."""
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return own and not found.st_mode & 0o077


def is_safe_program(file: Path) -> bool:
    """Whether ``file`` is a regular one that only this user, or root, can have written."""
    found = file.lstat()
    own = stat.S_ISREG(found.st_mode) and found.st_uid in (os.getuid(), 0)
    return own and not found.st_mode & 0o022
