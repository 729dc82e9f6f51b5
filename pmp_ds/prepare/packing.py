"""Pack token arrays into fixed blocks: an EOS after every document, optionally a BOS before it, cut
every ``block_size``.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.unsignedinteger]

_FLUSH_TOKENS = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smaller of uint16 and uint32 that represents every id below ``vocab_size``."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def is_validation(document: bytes, val_fraction: float) -> bool:
    """Return whether a document is held out: its sha256 as a number in [0, 1) is below the share.

    The choice depends only on the text (UTF-8), so copies of a document get the same split.
    """
    digest = hashlib.sha256(document).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2.0**64


class Packer:
    """Cuts one stream of documents into blocks. ``eos_id`` follows every document, and ``bos_id``
    precedes it unless that is None.
    """

    def __init__(
        self,
        block_size: int,
        eos_id: int,
        dtype: np.dtype[np.unsignedinteger],
        bos_id: int | None = None,
    ) -> None:
        self.block_size = block_size
        self._bos = np.array([] if bos_id is None else [bos_id], dtype)
        self._eos = np.array([eos_id], dtype)
        self._pending: list[Tokens] = []
        self._num_pending = 0

    def add(self, documents: Iterable[npt.NDArray[np.integer]]) -> Tokens:
        """Append documents (each ``(tokens,)``); return the full blocks, ``(n, block_size)``.

        n is 0 until enough tokens are collected, so that copies are large.
        """
        for ids in documents:
            self._pending += (self._bos, ids.astype(self._eos.dtype, copy=False), self._eos)
            self._num_pending += len(self._bos) + len(ids) + 1
        if self._num_pending < max(_FLUSH_TOKENS, self.block_size):
            return self._eos[:0].reshape(0, self.block_size)
        return self._cut()

    def finish(self) -> tuple[Tokens, int]:
        """Return the last full blocks ``(n, block_size)`` and the number of dropped tokens."""
        blocks = self._cut()
        dropped, self._pending, self._num_pending = self._num_pending, [], 0
        return blocks, dropped

    def _cut(self) -> Tokens:
        stream: Tokens = np.concatenate([*self._pending, self._eos[:0]])
        full = len(stream) // self.block_size * self.block_size
        self._pending, self._num_pending = [stream[full:].copy()], len(stream) - full
        return stream[:full].reshape(-1, self.block_size)


def pack_ref(
    documents: Iterable[Iterable[int]], block_size: int, eos_id: int, bos_id: int | None = None
) -> tuple[list[list[int]], int]:
    """Do what ``Packer`` does, token by token; return (blocks, dropped tokens)."""
    stream: list[int] = []
    for ids in documents:
        stream += [*ids, eos_id] if bos_id is None else [bos_id, *ids, eos_id]
    full = len(stream) // block_size * block_size
    return [stream[i : i + block_size] for i in range(0, full, block_size)], len(stream) - full
