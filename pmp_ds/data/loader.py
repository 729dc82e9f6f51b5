"""The order of the samples and the batches of one rank.

Key and number of blocks determine the global sample stream: sample ``s`` is block
``permute(s % n)`` of epoch ``s // n``. A rank reads its contiguous share of every global batch (the
first ranks read one more if shares are unequal), so the stream is the same for any number of ranks,
and ``consumed_samples`` is the only state.
"""

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

_ROUNDS = 4
_READ_AHEAD = 2  # waiting chunks, besides the one being gathered
_CHUNK_BLOCKS, _CHUNK_BYTES = 8192, 1 << 22  # maxima; gathering many blocks at once costs far less


class BlockSource(Protocol):
    """The loader's input: ``blocks.Blocks`` or anything like it."""

    def __len__(self) -> int: ...

    def gather(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[Any]: ...


@runtime_checkable
class SampleSource(Protocol):
    """Input with an order of its own: ``mixture.Mixture``."""

    def __len__(self) -> int: ...

    def read(self, samples: npt.NDArray[np.int64], key: bytes) -> npt.NDArray[Any]: ...


def order_key(purpose: str, seed_or_secret: int | bytes) -> bytes:
    """Return 32 bytes that order one stream; other purposes or seeds give unrelated orders."""
    if isinstance(seed_or_secret, int):
        material = b"seed:%d" % seed_or_secret
    else:
        material = b"secret:" + seed_or_secret
    domain = b"pmp-ds order:%d:" % len(purpose.encode()) + purpose.encode() + b":"
    return hashlib.sha256(domain + material).digest()


def permute(
    index: npt.NDArray[np.integer],  # (m,) positions in [0, n)
    n: int,
    key: bytes,
    epoch: int,
) -> npt.NDArray[np.int64]:
    """Return a pseudo-random permutation of ``[0, n)`` at the given positions, ``(m,)`` int64.

    Four Feistel rounds act on the smallest sufficient power of two; results outside ``[0, n)`` are
    permuted again until they fall inside (fewer than twice on average). Memory is needed for
    ``index`` alone, whatever ``n`` is.
    """
    bits = max(2, (n - 1).bit_length())
    right_bits = bits // 2
    half_bits = (bits - right_bits, right_bits)
    round_keys = np.frombuffer(
        hashlib.blake2b(
            epoch.to_bytes(8, "little"), key=key, digest_size=8 * _ROUNDS, person=b"feistel"
        ).digest(),
        "<u8",
    )
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        moved = _feistel(out[todo], half_bits, round_keys)
        out[todo] = moved
        todo = todo[moved >= np.uint64(n)]
    return out.astype(np.int64)


def _feistel(
    value: npt.NDArray[np.uint64],
    half_bits: tuple[int, int],
    round_keys: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """Make one pass over ``[0, 2^sum(half_bits))``; each round moves a half by the other's hash."""
    shift = np.uint64(half_bits[1])
    masks = tuple(np.uint64((1 << b) - 1) for b in half_bits)
    halves = [value >> shift, value & masks[1]]
    for number, key in enumerate(round_keys):
        target = number % 2
        halves[target] = (halves[target] + _mix(halves[1 - target] ^ key)) & masks[target]
    return (halves[0] << shift) | halves[1]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every input bit over all 64 (xor-shift and multiply; wraps modulo 2^64)."""
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xA0761D6478BD642F)
    return x ^ (x >> np.uint64(29))


def shuffled(
    blocks: BlockSource,
    samples: npt.NDArray[np.int64],  # (m,) numbers in an endless stream of epochs
    key: bytes,
) -> npt.NDArray[Any]:
    """Return the blocks of these samples, ``(m, block_size)``; every epoch has its permutation."""
    n = len(blocks)
    epochs, positions = samples // n, samples % n
    indices = np.empty_like(samples)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permute(positions[here], n, key, int(epoch))
    return blocks.gather(indices)


class BlockLoader:
    """Batches of one rank, gathered ahead by a background thread.

    Use it as a context manager or call ``close``. ``consumed_samples`` counts over all ranks and
    covers exactly the batches returned by ``next``.
    """

    def __init__(
        self,
        blocks: BlockSource | SampleSource,
        key: bytes,
        global_batch_size: int,
        rank: int,
        world_size: int,
        consumed_samples: int = 0,
        *,
        pin_memory: bool = False,
    ) -> None:
        """Start reading ahead: ``next`` returns ``global_batch_size`` sequences over all ranks.

        ``key`` is an ``order_key``. With ``pin_memory`` batches are page-locked, so that a GPU
        copies them while it computes.
        """
        assert len(blocks) > 0
        assert 0 <= rank < world_size <= global_batch_size
        self.consumed_samples = consumed_samples
        self.wait_seconds = 0.0
        """Seconds that ``next`` has spent waiting for batches."""
        self._blocks, self._key = blocks, key
        share, more = divmod(global_batch_size, world_size)
        self._global_batch_size, self._pin_memory = global_batch_size, pin_memory
        self._first, self._share = rank * share + min(rank, more), share + (rank < more)
        self._chunk: Iterator[npt.NDArray[Any]] = iter(())
        self._ready: queue.Queue[npt.NDArray[Any] | BaseException] = queue.Queue(_READ_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(consumed_samples,), name="block-loader", daemon=True
        )
        self._thread.start()

    def next(self) -> torch.Tensor:
        """Return this rank's share of the next batch, ``(share, block_size)`` int64.

        Raises any error of the background thread.
        """
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        batch = next(self._chunk, None)
        if batch is None:
            start = time.perf_counter()
            chunk = self._ready.get()
            self.wait_seconds += time.perf_counter() - start
            if isinstance(chunk, BaseException):
                self.close()
                raise chunk
            self._chunk = iter(chunk)
            batch = next(self._chunk)
        self.consumed_samples += self._global_batch_size
        # Convert to int64 here, per batch: chunks of int64 would need four times the memory.
        out = torch.empty(batch.shape, dtype=torch.int64, pin_memory=self._pin_memory)
        out.numpy()[:] = batch
        return out

    def close(self) -> None:
        """Stop the thread; may be called twice."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # in case the thread waits for a free place
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> "BlockLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, first_sample: int, num_batches: int) -> npt.NDArray[Any]:
        """Return this rank's share of the global batches from ``first_sample`` on,
        ``(num_batches, share, block_size)``, as stored.
        """
        starts = first_sample + np.arange(num_batches, dtype=np.int64) * self._global_batch_size
        share = self._first + np.arange(self._share, dtype=np.int64)
        samples = (starts[:, None] + share).reshape(-1)
        if isinstance(self._blocks, SampleSource):
            blocks = self._blocks.read(samples, self._key)
        else:
            blocks = shuffled(self._blocks, samples, self._key)
        return blocks.reshape(num_batches, self._share, -1)

    def _read_ahead(self, first_sample: int) -> None:
        """Read chunks that double in batches, so that the first one is ready early."""
        item: npt.NDArray[Any] | BaseException
        num_batches, grow = 1, True
        while not self._stop.is_set():
            try:
                item = self._read(first_sample, num_batches)
            except BaseException as error:  # noqa: BLE001 - raised by next()
                if num_batches > 1:  # deliver the readable batches before the error
                    num_batches, grow = 1, False
                    continue
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
            first_sample += num_batches * self._global_batch_size
            blocks = num_batches * self._share
            if grow and 2 * blocks <= _CHUNK_BLOCKS and 2 * item.nbytes <= _CHUNK_BYTES:
                num_batches *= 2
