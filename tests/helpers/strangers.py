"""Crafted files of untrusted origin: well-formed, with unexpected content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pmp_ds.ticket.mask import pack
from pmp_ds.ticket.ticket import MANIFEST_FILE, MASK_FILE

Bits = dict[str, torch.Tensor]
Shapes = Mapping[str, Any]


def packed(shapes: Shapes) -> Bits:
    """Return packed bits with every second element kept."""
    return {
        name: pack(torch.arange(torch.Size(shape).numel()) % 2 == 0)
        for name, shape in shapes.items()
    }


def ticket_files(bits: Bits, shapes: Shapes, **changes: Any) -> dict[str, bytes]:
    """Return the two files of a ticket with an id that matches ``bits`` and ``shapes``, whatever
    they are; ``changes`` to the manifest come last."""
    digest = hashlib.sha256(b"pmp-ds ticket\n")
    for name, shape in shapes.items():
        digest.update(f"{name}{list(shape)}\n".encode())
        digest.update(bits[name].numpy().tobytes() if name in bits else b"")
    ones = sum(
        int.from_bytes(b.numpy().tobytes(), "little").bit_count()
        for b in bits.values()
        if b.dtype == torch.uint8
    )
    manifest = {
        "density": 0.5,
        "source": "random",
        "score": None,
        "step": None,
        "stable": True,
        "model_digest": "d" * 64,
        "format_version": 1,
        "id": digest.hexdigest(),
        "num_kept": ones,
        "num_params": sum(torch.Size(s).numel() for s in shapes.values() if _plain(s)),
        "parameters": {name: list(shape) for name, shape in shapes.items()},
    }
    return {MASK_FILE: save(bits), MANIFEST_FILE: json.dumps(manifest | changes).encode()}


def write_ticket(folder: Path, bits: Bits, shapes: Shapes, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    for name, content in ticket_files(bits, shapes, **changes).items():
        (folder / name).write_bytes(content)
    return folder


def _plain(shape: Any) -> bool:
    return all(type(size) is int and 0 <= size < 1 << 31 for size in shape)
