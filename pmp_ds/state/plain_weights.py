"""A run's plain private weights and facts for a model card: all that export may read."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pmp_ds.config.precision import precision_of
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import constants
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.state import shelf, theta0, weight_files
from pmp_ds.state.run_record import load_config, read_data
from pmp_ds.ticket.mask import ParamMask


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
    model = theta0.draw(config, read_data(run), theta0.init_of(run, config))
    theta0.check(run, model)
    fixed = {name: buffer.clone() for name, buffer in constants(model).items()}  # keep their dtype
    model = model.to(precision_of(config.train).dtype)
    make_private(folder)
    tensors = {name: param.detach() for name, param in model.named_parameters()}
    weight_files.save_weights((tensors | fixed).items(), model.config, folder)
    return PlainWeights(folder, 0, None)


def complement_changes(weights: PlainWeights, initial: PreTrainedModel, mask: ParamMask) -> int:
    """Return how many elements outside the ticket, including frozen parameters, differ from
    theta(0): 0, unless masking is broken."""
    stored = weight_files.read_weights(weights.folder)
    changed = 0
    for name, param in initial.named_parameters():
        now = stored(name)
        differs = now != param.detach().to(now.dtype)
        if name in mask.shapes:
            differs &= ~mask.full(name)
        changed += int(differs.sum())
    return changed
