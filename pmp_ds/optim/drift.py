"""Is what must not change still what it was? A sample of the frozen elements, and the mask itself.

Memory of a machine can go bad, and so can code that is put around this one; the promise of a
bit-frozen complement (paper, Eq. 5) is worth a look from time to time.
"""

import hashlib
import zlib

import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.zero_shards import Fragment, ZeroShards

SAMPLE = 1024  # elements looked at per fragment, of which the frozen ones are kept


class DriftProbe:
    """Remembers a sample of this rank's frozen elements and a checksum of its share of the mask."""

    def __init__(self, shards: ZeroShards, optimizer: MaskedOptimizer) -> None:
        """Of an armed optimizer, before its first update."""
        self._shards, self._optimizer = shards, optimizer
        self._where = [self._sample(f) for f in shards.fragments]
        self._values = self._read()
        self._checksum = self._mask_checksum()

    def changed(self) -> int:
        """Frozen elements of the sample that differ in any bit from what they were."""
        now = self._read()
        return sum(
            int((a.view(torch.uint8) != b.view(torch.uint8)).any(dim=-1).sum())
            for a, b in zip(now, self._values, strict=True)
            if a.numel()
        )

    def mask_is_intact(self) -> bool:
        return self._mask_checksum() == self._checksum

    def _sample(self, f: Fragment) -> torch.Tensor:
        """(n,) int64 places in the flat of frozen elements of a fragment, evenly spread."""
        flat = self._shards.flats[f.flat]
        bits = self._optimizer.bits(flat)
        if bits is None:
            return torch.empty(0, dtype=torch.int64, device=flat.device)
        # Another phase in each fragment, so that no column of a matrix is left out everywhere.
        phase = int.from_bytes(hashlib.sha256(f"{f.name}/{f.start}".encode()).digest()[:4])
        stride = max(1, f.numel // SAMPLE)
        places = f.flat_start + torch.arange(phase % stride, f.numel, stride, device=flat.device)
        kept = (bits[places // 8] >> (places % 8).to(torch.uint8)) & 1
        return places[kept == 0]

    def _read(self) -> list[torch.Tensor]:
        """(n, 1) values of each fragment's sample."""
        return [
            self._shards.flats[f.flat].detach().view(-1)[places].cpu()[:, None]
            for f, places in zip(self._shards.fragments, self._where, strict=True)
        ]

    def _mask_checksum(self) -> int:
        checksum = 0
        for flat in self._shards.flats:
            if (bits := self._optimizer.bits(flat)) is not None:
                checksum = zlib.crc32(bits.cpu().numpy().tobytes(), checksum)
        return checksum
