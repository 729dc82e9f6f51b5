"""Check that frozen elements and the mask in memory have not changed, from a sample.

Memory can fail, and code around this package can have bugs; a bit-frozen complement (paper, Eq. 5)
is a promise worth checking from time to time.
"""

import hashlib
import zlib

import torch

from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.zero import Fragment, ZeroShards

SAMPLE = 1024  # elements sampled per fragment; the frozen ones among them are kept


class DriftProbe:
    """A sample of this rank's frozen elements and a checksum of its share of the mask."""

    def __init__(self, shards: ZeroShards, optimizer: MaskedOptimizer) -> None:
        """Take the sample from an armed optimizer, before its first update."""
        self._shards, self._optimizer = shards, optimizer
        self._where = [self._sample(f) for f in shards.fragments]
        self._values = self._read()
        self._checksum = self._mask_checksum()

    def changed(self) -> int:
        """Return the number of sampled frozen elements that changed in any bit."""
        now = self._read()
        return sum(
            int((a.view(torch.uint8) != b.view(torch.uint8)).any(dim=-1).sum())
            for a, b in zip(now, self._values, strict=True)
            if a.numel()
        )

    def mask_is_intact(self) -> bool:
        return self._mask_checksum() == self._checksum

    def _sample(self, f: Fragment) -> torch.Tensor:
        """Return evenly spaced places of a fragment's frozen elements in its flat, (n,) int64."""
        flat = self._shards.flats[f.flat]
        bits = self._optimizer.bits(flat)
        if bits is None:
            return torch.empty(0, dtype=torch.int64, device=flat.device)
        # The phase differs between fragments, so no column of a matrix is always left out.
        phase = int.from_bytes(hashlib.sha256(f"{f.name}/{f.start}".encode()).digest()[:4])
        stride = max(1, f.numel // SAMPLE)
        places = f.flat_start + torch.arange(phase % stride, f.numel, stride, device=flat.device)
        kept = (bits[places // 8] >> (places % 8).to(torch.uint8)) & 1
        return places[kept == 0]

    def _read(self) -> list[torch.Tensor]:
        """Return the sampled values of each fragment, (n, 1) each."""
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
