"""Provide a name and a home for a user without them, as under `docker run --user 12345`.

Python's getpass, torch and the caches of Hugging Face, Triton and DeepSpeed use both, some of them
during import, so pmp_ds/__init__.py calls ``complete`` first. Child processes inherit both.
"""

import contextlib
import getpass
import os
import stat
import tempfile
from pathlib import Path


def complete() -> None:
    """Set LOGNAME and USER if the user has no name, and HOME if `~` leads nowhere."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["LOGNAME"] = os.environ["USER"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        with contextlib.suppress(OSError):
            os.environ["HOME"] = str(temporary_folder())


def temporary_folder() -> Path:
    """Return a folder of this user alone, the same for every process if possible.

    Programs are cached in it, so a folder that another user can write to is never used.
    """
    folder = Path(tempfile.gettempdir()) / f"pmp_ds-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    ours = is_private(folder)
    return folder if ours else Path(tempfile.mkdtemp(prefix="pmp_ds-"))


def is_private(folder: Path) -> bool:
    """Return whether ``folder`` belongs to this user, is not a link, and is closed to others."""
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return own and not found.st_mode & 0o077


def is_safe_program(file: Path) -> bool:
    """Return whether ``file`` is regular and only this user or root can have written it."""
    found = file.lstat()
    own = stat.S_ISREG(found.st_mode) and found.st_uid in (os.getuid(), 0)
    return own and not found.st_mode & 0o022
