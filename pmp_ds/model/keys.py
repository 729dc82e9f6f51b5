"""A run's secret key, and the keys derived from it."""

import os
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pmp_ds.errors import UserError
from pmp_ds.foreign import MissingError, read_bytes
from pmp_ds.run_dir import atomic_path, make_private

KEY_BYTES = 32
KEY_FILE = "key"
_MOST_BYTES = 1 << 20


class Secret(bytes):
    """Key bytes that stay hidden in logs, tracebacks and f-strings."""

    def __repr__(self) -> str:
        return f"Secret(<{len(self)} bytes>)"

    __str__ = __repr__


def create_key(folder: Path) -> Secret:
    """Write a new 32-byte key, ``folder``/key (a run's ``private/init``), and return it.

    The folder becomes 0700, and the file is 0600 before its first byte. The caller must know that
    nothing depends on an earlier key of that folder.
    """
    make_private(folder)
    path = folder / KEY_FILE
    if not path.exists():
        with atomic_path(path, private=True) as temporary:
            temporary.write_bytes(os.urandom(KEY_BYTES))
    return load_key(folder)


def load_key(folder: Path) -> Secret:
    """Return the key in ``folder``. Raises UserError when it is missing or damaged."""
    path = folder / KEY_FILE
    try:
        key = read_bytes(path, _MOST_BYTES)
    except MissingError:
        raise UserError(
            f"{path} is missing: restore the run's own key from a backup; no other key can replace "
            "it"
        ) from None
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} has {len(key)} bytes, but a key has {KEY_BYTES}: restore the run's own key "
            "from a backup; no other key can replace it"
        )
    return Secret(key)


def derive(key: bytes, purpose: str) -> Secret:
    """Derive a 32-byte key for ``purpose`` (HKDF-SHA256, RFC 5869); none reveals another.

    Purposes that start with ``init/`` belong to the initial weights.
    """
    hkdf = HKDF(
        algorithm=hashes.SHA256(), length=KEY_BYTES, salt=b"pmp-ds v1", info=purpose.encode()
    )
    return Secret(hkdf.derive(bytes(key)))
