"""An authorized derivative, dithered for its release: reads the ticket, so that export need not."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError
from pmp_ds.model.secret_init import derive
from pmp_ds.model.stream import uniforms
from pmp_ds.progress import Progress
from pmp_ds.run_dir import make_private
from pmp_ds.ticket.ticket import load_ticket
from pmp_ds.train import weight_files
from pmp_ds.train.dither import Uniforms, dither

_BATCH = 8  # blocks


def write_dithered(derivative: Path, base: Path, ticket: Path, out: Path) -> None:
    """Write the ``derivative`` of ``base`` (Hugging Face folders) to ``out``, in the base's dtype,
    with the changes of the ``ticket``'s complement drawn like the ticket's own.

    The same input gives the same output: the draws are keyed by the ticket and the derivative.
    Raises UserError when the three do not belong together.
    """
    mask = (loaded := load_ticket(ticket)).mask
    before, after = _opened(base), _opened(derivative)
    config = AutoConfig.from_pretrained(derivative, local_files_only=True)
    key = bytes.fromhex(loaded.id)
    make_private(out)
    with Progress("dither", "tensor", len(mask.shapes)) as bar:

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in mask.shapes:
                old, kept = before(name), mask.full(name)
                kept = kept[: old.shape[0]]  # a release has no rows that pad the vocabulary
                new = after(name).to(old.dtype)
                if new.shape != old.shape or kept.shape != old.shape:
                    raise UserError(
                        f"{name} has shape {list(new.shape)} in {derivative}, {list(old.shape)} "
                        f"in {base} and {list(kept.shape)} in {ticket}: they do not go together"
                    )
                if moved := int(((new != old) & ~kept).sum()):
                    raise UserError(
                        f"{derivative} is no authorized derivative of {base}: {moved:,} elements "
                        f"outside the ticket of {ticket} changed. Name the release it was "
                        "fine-tuned from and the ticket it was fine-tuned with"
                    )
                yield name, dither(old, new, kept, _stream(key, name, new))
                bar.update()

        weight_files.save_weights(tensors(), config, out)


def loss_on(weights: Path, store: Path, blocks: int) -> float:
    """Mean nats per token of a model on the first ``blocks`` validation blocks of a text store."""
    held_out = Store.open(store).split("validation")
    count = min(blocks, len(held_out))
    if not count:
        raise UserError(f"--store {store} has no validation blocks: prepare one that has")
    model = AutoModelForCausalLM.from_pretrained(weights, local_files_only=True).eval()
    total = 0.0
    with torch.inference_mode():
        for low in range(0, count, _BATCH):
            indices = np.arange(low, min(low + _BATCH, count))
            input_ids = torch.from_numpy(held_out.gather(indices).astype(np.int64))
            total += float(model(input_ids=input_ids, labels=input_ids).loss) * len(indices)
    return total / count


def _opened(folder: Path) -> Callable[[str], torch.Tensor]:
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no *.safetensors: name a Hugging Face model folder")
    read = weight_files.read_weights(folder)

    def tensor(name: str) -> torch.Tensor:
        try:
            return read(name)
        except KeyError:
            raise UserError(
                f"{folder} lacks {name}, which the ticket covers: it is another model, or an "
                "adapter that has to be merged first"
            ) from None

    return tensor


def _stream(key: bytes, name: str, tensor: torch.Tensor) -> Uniforms:
    """Uniforms that depend on the ticket and on this tensor of the undithered derivative."""
    content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    own, position = derive(key, f"dither/{name}/{content}"), 0

    def draw(count: int) -> torch.Tensor:
        nonlocal position
        position += count
        return torch.from_numpy(uniforms(own, position - count, count))

    return draw
