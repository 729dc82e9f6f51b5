"""The files of a run. Every file name of a run is spelled here and nowhere else.

runs/NAME/config.yaml  data.json  verified.json  micro_batch.json  machine.json  tokenizer/
               metrics.jsonl  metrics.prom  tensorboard/  plots/  stacks/  profile/  report.html
runs/NAME/release/     the only folder to publish
runs/NAME/private/     ticket/  init/  checkpoints/  vault/  ledger.jsonl   0700, files 0600
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pmp_ds.errors import UserError
from pmp_ds.foreign import ForeignError, read_object

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run; ``root`` need not exist yet."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def data(self) -> Path:
        """The run's facts about its tokens, so that export needs no store."""
        return self.root / "data.json"

    @property
    def verified(self) -> Path:
        """The shards of its store found intact, so that a restart does not read them."""
        return self.root / "verified.json"

    @property
    def micro_batch(self) -> Path:
        """What `train.micro_batch_size: auto` chose, by hardware."""
        return self.root / "micro_batch.json"

    @property
    def machine(self) -> Path:
        """What its last start ran on: ranks, device, DeepSpeed JSON."""
        return self.root / "machine.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def textfile(self) -> Path:
        """The newest numbers for Prometheus."""
        return self.root / "metrics.prom"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def stacks(self) -> Path:
        """The stacks of the ranks of a run that hung."""
        return self.root / "stacks"

    @property
    def on_fault(self) -> Path:
        """Exists after the command `guard.on_fault` ran, until the next start."""
        return self.root / ".on-fault"

    @property
    def profile(self) -> Path:
        """Traces of single updates, as `train.profile` asks for."""
        return self.root / "profile"

    @property
    def release(self) -> Path:
        """The only folder to publish."""
        return self.root / "release"

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def ticket(self) -> Path:
        return self.private / "ticket"

    @property
    def init(self) -> Path:
        return self.private / "init"

    @property
    def checkpoints(self) -> Path:
        return self.private / "checkpoints"

    @property
    def vault(self) -> Path:
        """The recipients of sealed copies of the ticket."""
        return self.private / "vault"

    @property
    def ledger(self) -> Path:
        """The releases of this run."""
        return self.private / LEDGER

    def create(self) -> None:
        """Create the folders; the private ones are readable by their owner alone from the start."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in (self.private, self.ticket, self.init, self.checkpoints):
            make_private(folder)


def sweep(run: RunDir) -> None:
    """Remove files half written by killed processes; no other process may be writing to ``run``.
    What cannot be removed, such as a file that is open on NFS, and the release stay: they are never
    read."""
    for path in [*run.root.rglob(".*.incomplete"), *run.checkpoints.glob("*.incomplete")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def make_private(folder: Path) -> None:
    """Create ``folder`` as 0700; close an existing one to others."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def loose(*paths: Path) -> list[str]:
    """Return a line for each existing file or folder, and each entry in it, that others than its
    owner can access: folders should be 0700 and files 0600."""
    found = []
    for path in (p for given in paths for p in [given, *sorted(given.rglob("*"))]):
        if path.exists() and (mode := path.stat().st_mode & 0o777) & 0o077:
            wanted = "700" if path.is_dir() else "600"
            found.append(f"{path} is open to others (mode {mode:o}): chmod {wanted} {path}")
    return found


def fsync_dir(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def eventually(there: Callable[[], bool], path: Path, seconds: float = 30.0) -> bool:
    """Return whether ``there`` becomes true in time for ``path``, written by another machine: a
    network file system remembers for a while that a file was missing."""
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            return False
        for folder in path.parents:  # opening a folder asks the server for its content
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.25)
    return True


def lock(file: IO[bytes]) -> None:
    """Hold ``file`` until it is closed, after any other process releases it. A network file system
    without locks does not wait."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


@contextlib.contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success fsync it and rename it to ``path``.

    With ``private`` the file exists as 0600 before its first byte. On an error nothing is left. Two
    machines may write the same path at once: one of the files stays, whole.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.incomplete")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o644))
    try:
        yield temporary
        if private:  # writers such as safetensors replace the file and its mode
            temporary.chmod(0o600)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the digest of a file's content, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    with atomic_path(path, private=private) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    write_bytes(path, text.encode(), private=private)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write ``value`` with sorted keys, so that equal values are equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n", private=private)


def read_json(path: Path) -> dict[str, Any]:
    """Return a dict written by ``write_json``. Raises UserError when it is lost or damaged."""
    try:
        return read_object(path)
    except ForeignError as error:
        raise UserError(f"{error}: restore it from a backup") from None
