"""Dither an authorized derivative for its release; this reads the ticket, so export need not."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pmp_ds.data.arrow_store import Store
from pmp_ds.derivative.dither import Uniforms, dither, draw_donors
from pmp_ds.errors import UserError
from pmp_ds.model.folder import ModelFolder, open_folder
from pmp_ds.model.keys import derive
from pmp_ds.model.next_token import token_losses
from pmp_ds.model.stream import uniforms
from pmp_ds.progress import Progress
from pmp_ds.run_dir import make_private
from pmp_ds.state import weight_files
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.ticket import load_ticket

_BATCH = 8  # blocks


def write_dithered(derivative: Path, base: Path, ticket: Path, out: Path) -> None:
    """Write the ``derivative`` of ``base`` (Hugging Face folders) to ``out``, in the base's dtype,
    with changes outside the ``ticket`` drawn from the ticket's own.

    Equal input gives equal output, because ticket and derivative key the draws. Raises UserError
    when the three do not belong together.
    """
    loaded = load_ticket(ticket)
    released, tuned = open_folder(base), open_folder(derivative)
    before, stored = _reader(released), _reader(tuned)
    mask = fitted(loaded.mask, released.trained, base)
    key = bytes.fromhex(loaded.id)
    if dict(tuned.shapes) != dict(released.shapes):
        raise UserError(f"{derivative} is not a derivative of {base}: names or shapes differ")

    def after(name: str) -> torch.Tensor:
        return stored(name).to(before(name).dtype)

    names, sizes = [*released.shapes, *released.constants], {}
    for name in names:
        old = before(name)
        sizes[name], changed = old.nbytes, after(name) != old
        if moved := int((changed & ~mask.full(name) if name in mask.shapes else changed).sum()):
            raise UserError(
                f"{derivative} is not an authorized derivative of {base}: {moved:,} elements "
                f"outside the ticket of {ticket} changed. Name the release and the ticket that it "
                "was fine-tuned with"
            )
    donors = draw_donors(mask, before, after, _stream(key, "dither/donors"))
    make_private(out)
    with Progress("dither", "tensor", len(mask.shapes)) as bar:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                old, new = before(name), after(name)
                if name not in mask.shapes:  # frozen, or a buffer: public, and never trained
                    yield name, old
                    continue
                draws = _content_stream(key, name, new)
                yield name, dither(old, new, mask.full(name), donors, draws)
                bar.update()

        layout = weight_files.Layout.of(sizes)
        weight_files.save_weights(tensors(), layout, tuned.config, out)


def loss_on(weights: Path, store: Path, blocks: int) -> float:
    """Return a model's mean nats per token on the first validation blocks of a text store."""
    held_out = Store.open(store).split("validation")
    count = min(blocks, len(held_out))
    if not count:
        raise UserError(f"--store {store} has no validation blocks: prepare one with some")
    model = open_folder(weights).load().eval()
    total = 0.0
    with torch.inference_mode():
        for low in range(0, count, _BATCH):
            indices = np.arange(low, min(low + _BATCH, count))
            input_ids = torch.from_numpy(held_out.gather(indices).astype(np.int64))
            logits = model(input_ids=input_ids, use_cache=False).logits
            total += float(token_losses(logits, input_ids).mean(dim=1).sum())
    return total / count


def _reader(folder: ModelFolder) -> Callable[[str], torch.Tensor]:
    """Return a function from name to tensor of ``folder``. Raises UserError if names differ."""
    folder.require_names()
    return lambda name: cast(torch.Tensor, folder.handles[name].get_tensor(name))


def _content_stream(key: bytes, name: str, tensor: torch.Tensor) -> Uniforms:
    """Return uniforms that depend on the ticket and on this undithered tensor."""
    content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return _stream(key, f"dither/{name}/{content}")


def _stream(key: bytes, purpose: str) -> Uniforms:
    own, position = derive(key, purpose), 0

    def draw(count: int) -> torch.Tensor:
        nonlocal position
        position += count
        return torch.from_numpy(uniforms(own, position - count, count))

    return draw
