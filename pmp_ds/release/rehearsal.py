"""Rehearse a release at tiny width before training, so that export's refusals come early.

    rehearse(hf_config)

It writes, checks and reloads with export's own code, so every new rule applies here too. It takes a
second or two and writes only to a temporary folder.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds.config.precision import PRECISIONS
from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model
from pmp_ds.model.folder import few, read_config
from pmp_ds.model.folder_rules import SINGLE_FILE, first_line
from pmp_ds.model.keys import KEY_BYTES, Secret
from pmp_ds.model.parameters import constants
from pmp_ds.model.secret_init import initialize
from pmp_ds.model.shrink import shrunk
from pmp_ds.release.allow_list import about_model
from pmp_ds.release.export import write_model
from pmp_ds.release.metadata import release_config
from pmp_ds.release.reload import compute
from pmp_ds.release.source import open_source
from pmp_ds.release.tokenizer_files import as_json
from pmp_ds.release.verify import probe, reference_logits, require_same
from pmp_ds.tensor_file import write_tensors

_SMALL = 1 << 26  # parameters; a model this small that does not shrink is tried as it is
_AHEAD = 1e-4  # of the largest logit; more than rounding
_SHARP = 0.2  # standard deviation of matrices whose attention is not nearly uniform


def rehearse(config: PreTrainedConfig, *, secret: bool = True) -> None:
    """Raise UserError with the reason unless a model of ``config`` can be trained on text and
    released. ``secret``: its initial weights are drawn from a key."""
    with _quietly(), tempfile.TemporaryDirectory() as scratch:
        try:
            num_params = _require_same_architecture(config, Path(scratch))
            model = _small_model(config, num_params)
            if model is None:
                return
            if secret:
                initialize(model, Secret(bytes(KEY_BYTES)))
            _require_constant(model)
            _require_release(model, Path(scratch) / "bf16", "bf16")
            _sharpen(model)
            _require_causal(model)
            _require_release(model, Path(scratch) / "fp32", "fp32")
        except UserError as error:
            raise UserError(f"model_type={config.model_type!r} is not trained: {error}") from None


def _require_same_architecture(config: PreTrainedConfig, scratch: Path) -> int:
    """Require the released config.json to describe tensors of the same names and shapes, and return
    the number of parameters. Raises UserError."""
    model = _on_meta(config)
    (scratch / "config.json").write_text(as_json(release_config(config, "bfloat16")), "utf-8")
    reloaded = _on_meta(read_config(scratch))
    before, after = _shapes(model), _shapes(reloaded)
    if before != after:
        differ = [name for name in before | after if before.get(name) != after.get(name)]
        raise UserError(
            f"config.json of its release would describe another architecture ({few(differ)} "
            f"differ); its class {type(config).__name__} does not keep every setting"
        )
    return sum(param.numel() for param in model.parameters())


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 - transformers raises anything here
        raise UserError(f"its config.json describes no model: {first_line(error)}") from None
    return model


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    tensors = [*model.named_parameters(), *constants(model).items()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _small_model(config: PreTrainedConfig, num_params: int) -> PreTrainedModel | None:
    """Return a model that reads text and trains: shrunk, or as it is when small. Returns None for a
    large one that does not shrink; its names and shapes must suffice."""
    try:
        model = build_model(shrunk(config))
        _differentiate(model)
        return model
    except Exception:  # noqa: BLE001 - whatever fails at that width
        if num_params > _SMALL:
            return None
    try:
        model = build_model(config)
        _differentiate(model)
        return model
    except Exception as error:  # noqa: BLE001 - transformers raises anything here
        raise UserError(f"it does not train on text alone: {first_line(error)}") from None


def _differentiate(model: PreTrainedModel) -> None:
    logits = model.train()(input_ids=probe(model.config), use_cache=False).logits
    logits.float().square().mean().backward()


def _require_constant(model: PreTrainedModel) -> None:
    """Raise UserError when training changes more than parameters: a resumed run would differ."""
    before = {name: buffer.clone() for name, buffer in constants(model).items()}
    _differentiate(model)
    changed = [name for name, buffer in constants(model).items() if not buffer.equal(before[name])]
    if changed:
        raise UserError(
            f"its forward pass changes {few(changed)}, which neither gradients nor masks control"
        )


def _sharpen(model: PreTrainedModel) -> None:
    """Draw matrices so large that every setting affects the logits."""
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(std=_SHARP)


def _require_causal(model: PreTrainedModel) -> None:
    """Raise UserError when a token changes predictions before it."""
    input_ids = probe(model.config)
    other = input_ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.vocab_size
    with torch.inference_mode():
        pair = [model.eval()(input_ids=ids, use_cache=False).logits for ids in (input_ids, other)]
    one, two = (logits[:, :-1].float() for logits in pair)
    if not float((one - two).abs().max()) <= _AHEAD * float(one.abs().max()):
        way_out = ""
        if getattr(model.config, "is_decoder", True) is False:
            way_out = ': add "is_decoder": true to its config.json'
        raise UserError(
            f"it reads in both directions, so that a token sees later ones, but pretraining needs "
            f"a causal model{way_out}"
        )


def _require_release(model: PreTrainedModel, scratch: Path, short: str) -> None:
    """Raise UserError when a release of ``model`` breaks the allow-list, does not load or computes
    different logits."""
    weights, folder = scratch / "weights", scratch / "release"
    weights.mkdir(parents=True)
    folder.mkdir()
    dtype = PRECISIONS[short].dtype
    tensors = {n: t.detach().to(dtype) for n, t in model.named_parameters()}
    tensors |= {n: t.detach() for n, t in constants(model).items()}
    write_tensors(
        weights / SINGLE_FILE,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tensor.dtype for name, tensor in tensors.items()},
        lambda name: tensors[name].contiguous(),
    )
    (weights / "config.json").write_text(as_json(model.config.to_dict()), "utf-8")
    input_ids = probe(model.config)
    try:
        with closing(open_source(weights)) as source:
            write_model(source, folder, short, 1 << 40, quiet=True)
            if found := list(about_model(folder)):
                raise RuntimeError("; ".join(found))
            logits, problems, found_dtype, wide = compute(str(folder), input_ids)
            if problems or found_dtype != str(dtype):
                raise RuntimeError(f"it does not load cleanly: {found_dtype}, {problems}")
            require_same(logits, reference_logits(source, input_ids, dtype, wide), dtype)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - transformers raises anything here
        raise UserError(f"its release would not be the model: {first_line(error)}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress transformers' advice and preserve the caller's random state."""
    log = transformers.logging
    verbosity, had_bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if had_bar:
            log.enable_progress_bar()
