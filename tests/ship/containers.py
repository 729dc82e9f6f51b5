"""Build the image as `make test-image` does, and run containers from it.

    with store(folder):
        build_base("base")                       # Debian, Python and torch, by mmdebstrap
        build("image", "base", revision="0123")  # this checkout's Dockerfile
        done = container("image", "pmp-ds", "--version")

Images and layers are in ``folder``. The build installs with pip as this machine does: the settings
of `pip config list` are mounted as /etc/pip.conf, and so are the local folders and the certificates
that they name. IMAGE_MOUNTS adds mounts, for example `/opt/wheels:/opt/wheels:ro`, separated by
spaces; IMAGE_BASE names a base that exists, so that none is made.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from tests.helpers.distributed import REPO

Done = subprocess.CompletedProcess[str]

STORAGE = '[storage]\ndriver = "{driver}"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "cert", "timeout", "trusted-host")
PACKAGES = "python3,python3-pip,ca-certificates"
"""Like the images of PyTorch 2.13: a Python of the distribution, pip, and no ensurepip."""
HARDENED = shlex.split(
    "--network=none --read-only --tmpfs=/tmp:rw,exec,size=1g --shm-size=256m --cap-drop=all "
    "--security-opt=no-new-privileges --user=12345:12345 --env=DS_ACCELERATOR=cpu "
    "--env=OMP_NUM_THREADS=1"
)
"""As a strict cluster runs it: a user that the image does not know, nothing writable but /tmp."""

# Below the shell's own limits; runc because crun refuses hybrid cgroups.
_PODMAN = ("podman", "--runtime=runc")
_LIMITS = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")


@contextlib.contextmanager
def store(folder: Path) -> Iterator[Path]:
    """Keep images and containers of this process in ``folder``."""
    config = folder / "storage.conf"
    overlay = "overlay" in Path("/proc/filesystems").read_text()
    config.write_text(STORAGE.format(driver="overlay" if overlay else "vfs", folder=folder))
    before = os.environ.get("CONTAINERS_STORAGE_CONF")
    os.environ["CONTAINERS_STORAGE_CONF"] = str(config)
    try:
        yield folder
    finally:
        command(*_PODMAN, "rm", "--all", "--force", check=False)
        if before is None:
            del os.environ["CONTAINERS_STORAGE_CONF"]
        else:
            os.environ["CONTAINERS_STORAGE_CONF"] = before


def build_base(name: str, folder: Path) -> None:
    """Make an image of Debian with Python, and with the torch of the constraints."""
    archive = folder / "base.tar"
    release = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M)
    assert release is not None
    made = ("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}")
    command(*made, release[1], str(archive))
    command(*_PODMAN, "import", "--quiet", str(archive), f"{name}-python")
    archive.unlink()
    add("torch", name, f"{name}-python", folder)


def add(package: str, name: str, base: str, folder: Path) -> None:
    """Make an image with a package of the constraints beside the Python of ``base``."""
    constraints = (REPO / "constraints.txt").read_text()
    (pin,) = re.findall(rf"^{package}==\S+$", constraints, re.MULTILINE)
    install = "python3 -m pip install --quiet --no-cache-dir --no-deps --break-system-packages"
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        Path(empty, "Dockerfile").write_text(f"FROM {base}\nRUN {install} {pin}\n")
        _bud(name, Path(empty), folder)


def build(name: str, base: str, folder: Path, *, revision: str, cached: bool = True) -> None:
    """Build the Dockerfile of this checkout on ``base``."""
    given = {"BASE": base, "TORCH_INDEX": "", "REVISION": revision}
    words = [f"--build-arg={key}={value}" for key, value in given.items()]
    _bud(name, REPO, folder, *words, *(() if cached else ("--no-cache",)))


def container(image: str, *words: str, options: Sequence[str] = (), check: bool = True) -> Done:
    """Run a container to its end, as a strict cluster would, and return what it printed."""
    given = [*_PODMAN, "run", "--rm", *_LIMITS, *HARDENED, *options, image, *words]
    return command(*given, check=check)


def podman(*words: str) -> str:
    """Run podman and return its output."""
    return command(*_PODMAN, *words).stdout.strip()


def start(image: str, *words: str, options: Sequence[str] = ()) -> str:
    """Start a container and return its name."""
    return podman("run", "--detach", *_LIMITS, *HARDENED, *options, image, *words)


def command(*words: str, check: bool = True) -> Done:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, (
        f"{' '.join(words)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


def _bud(name: str, context: Path, folder: Path, *words: str) -> None:
    """Run buildah in chroot isolation, which works inside a container too."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        mounts = [f"--volume={mount}" for mount in _mounts(Path(temporary))]
        build = ("buildah", "build", "--layers", "--isolation=chroot", *mounts, *words)
        command(*build, f"--tag={name}", f"--file={context}/Dockerfile", str(context))


def _mounts(folder: Path) -> list[str]:
    """Return mounts that give pip in the build what pip has here."""
    asked = command(sys.executable, "-m", "pip", "config", "list").stdout
    pairs = re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", asked, re.MULTILINE)
    known = {key: value for key, value in pairs if key in PIP_OPTIONS}
    lines = [f"{key} = {value.replace(chr(92) + 'n', ' ')}" for key, value in known.items()]
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    found = {f"{folder}/pip.conf:/etc/pip.conf:ro"}
    for word in " ".join(known.values()).replace("\\n", " ").split():
        path = Path(unquote(urlparse(word).path) if word.startswith("file:") else word)
        if path.is_absolute() and path.exists():
            index = word.startswith("file:")  # its links lead to a folder beside it
            found.add(f"{path.parent if index or path.is_file() else path}")
    return [m if ":" in m else f"{m}:{m}:ro" for m in sorted(found)] + os.environ.get(
        "IMAGE_MOUNTS", ""
    ).split()


def linter() -> str | None:
    """Return the path of hadolint, or None."""
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")
