"""A run's plain private weights and facts for a model card: all that export may read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pmp_ds.config.precision import precision_of
from pmp_ds.errors import UserError
from pmp_ds.model.initial import WHOLE, Initial, Part, cut
from pmp_ds.model.parameters import constants
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state import shelf, theta0, weight_files
from pmp_ds.state.run_record import load_config
from pmp_ds.ticket.mask import ParamMask

_CHUNK = 1 << 22  # elements


@dataclass(frozen=True)
class PlainWeights:
    """A folder of safetensors and config.json, and its position in the run."""

    folder: Path
    updates: int
    val_loss: float | None  # newest at that update, nats per token


def of_checkpoint(run: RunDir, step: int | None) -> PlainWeights:
    """Return the newest checkpoint with intact weights, or that of update ``step``. Raises
    UserError when there is none."""
    found = shelf.find(run, step, part="weights/")
    if found is None:
        raise UserError(f"{run.root} has no checkpoint yet: let pmp-ds pretrain write one")
    folder, position = found
    return PlainWeights(folder / "weights", position.step, position.val_loss)


def of_init(run: RunDir, folder: Path) -> PlainWeights:
    """Draw theta(0) again into ``folder``, in the dtype that training starts from."""
    config = load_config(run)
    initial = theta0.initial_of(run, theta0.init_of(run, config))
    theta0.check(run, initial)
    dtype, model = precision_of(config.train).dtype, initial.model()
    make_private(folder)

    fixed = constants(model)  # in their own dtype

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        with initial.progress("initial weights", sum(initial.sizes.values())) as bar:
            for name, shape in initial.shapes.items():
                yield name, initial.read(name, 0, math.prod(shape)).view(shape).to(dtype)
                bar.update(math.prod(shape))
        yield from fixed.items()

    sizes = {name: numel * dtype.itemsize for name, numel in initial.sizes.items()}
    sizes |= {name: buffer.nbytes for name, buffer in fixed.items()}
    layout = weight_files.Layout.of(sizes)
    weight_files.save_weights(tensors(), layout, model.config, folder)
    return PlainWeights(folder, 0, None)


def complement_changes(
    weights: PlainWeights, initial: Initial, mask: ParamMask, part: Part = WHOLE
) -> int:
    """Return how many elements outside the ticket, including frozen parameters, differ from
    theta(0): 0, unless masking is broken. ``part``: this rank's share of the elements."""
    stored, changed = weight_files.slices(weights.folder), 0
    mine = list(cut(initial.sizes, _CHUNK))[part[0] :: part[1]]
    elements = sum(count for *_, count in mine)
    with initial.progress("checking the complement", elements, part) as bar:
        for name, start, count in mine:
            now = stored(name, start, count)
            differs = now != initial.read(name, start, count).to(now.dtype)
            if name in mask.shapes:
                differs &= ~mask.fragment(name, start, count)
            changed += int(differs.sum())
            bar.update(count)
    initial.forget()
    return changed
