"""theta(0), the initial weights of a run: drawn from its secret key or public seed, again and again
the same bits.

    private/init/key            32 bytes; made once, by the first start of a run
    private/init/theta0.json    digest of theta(0), a one-way check value of the key, and a seal
"""

import hmac
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmp_ds import dist, formats
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.parameters import ParamInfo, digest, trained_shapes, weights_digest
from pmp_ds.model.secret_init import KEY_FILE, Secret, create_key, derive, initialize, load_key
from pmp_ds.run_dir import RunDir, eventually, read_json, write_json
from pmp_ds.state import shelf
from pmp_ds.state.run_record import DataFacts, load_config, read_data
from pmp_ds.ticket.ticket import has_ticket

_FILE = "theta0.json"
_CHECK = "key_check"
_SEAL = "seal"
Init = Secret | int  # a key, or the public seed of paper mode


def architecture(config: Config, data: DataFacts) -> PreTrainedConfig:
    """The Hugging Face config; UserError when model and data do not fit together."""
    return model_config(
        config.model,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
        bos_id=data.bos_id,
        block_size=data.block_size,
    )


def model_digest(config: Config, data: DataFacts) -> str:
    """``parameters.digest`` of the configured model, without drawing a weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config, data))
    return digest([ParamInfo(n, shape, 0, 0, False) for n, shape in trained_shapes(model).items()])


def init_of(run: RunDir, config: Config, *, may_create: bool = False) -> Init:
    """Return what theta(0) is drawn from. Collective.

    The key is compared with what theta0.json remembers of it. With ``may_create``, which is for
    the start of a run alone, rank 0 makes a key where nothing was ever made with one. Every rank
    reads it for itself: it does not travel between them. Raises UserError when it is missing,
    damaged or another.
    """
    if config.init.seed is not None:
        return config.init.seed
    dist.on_rank0(lambda: _key(run, may_create) and None)
    path = run.init / KEY_FILE
    eventually(path.exists, path)
    return dist.together(lambda: load_key(run.init))


def _key(run: RunDir, may_create: bool) -> Secret:
    path = run.init / KEY_FILE
    if not path.exists() and (made := _made_with_key(run)) is not None:
        raise UserError(
            f"{path} is missing, and {made} was made with it: put the run's own key back from a "
            "backup, or choose another run.name; with a new key these initial weights would be lost"
        )
    key = create_key(run.init) if may_create else load_key(run.init)
    check_value = _remembered(run).get(_CHECK)
    if check_value is not None and not hmac.compare_digest(str(check_value), _check_value(key)):
        raise UserError(
            f"{path} is damaged or another run's: it is not the key that {run.init / _FILE} "
            "remembers; put the run's own key back from a backup"
        )
    return key


def _made_with_key(run: RunDir) -> Path | None:
    """Return something of this run that there is only once it has had a key."""
    for path in (run.init / _FILE, run.ledger, run.vault):
        if path.exists():
            return path
    if has_ticket(run.ticket):
        return run.ticket
    return run.checkpoints if shelf.has_any(run) else None


def _check_value(key: Secret) -> str:
    """Return what tells this key from another and tells nothing else of it (HKDF)."""
    return bytes(derive(key, "key check")).hex()


def _seal(key: Secret, digest: str) -> str:
    """Return what nobody without the key can write beside a digest (HMAC-SHA256)."""
    return hmac.digest(bytes(derive(key, "theta0 seal")), digest.encode(), "sha256").hex()


def require_key(run: RunDir) -> Secret:
    """Return the run's key after a check against theta0.json; rank 0 alone calls it.

    A run of an older pmp-ds has no check value: then theta(0) is drawn again, which takes a while.
    Raises UserError.
    """
    key = _key(run, may_create=False)
    if _CHECK not in _remembered(run):
        config = load_config(run)
        check(run, draw(config, read_data(run), key))
    return key


def draw(config: Config, data: DataFacts, init: Init) -> PreTrainedModel:
    """The configured model at theta(0), fp32 on CPU."""
    model = build_model(architecture(config, data))
    initialize(model, init)
    return model


def check(run: RunDir, model: PreTrainedModel, *, may_be_new: bool = False) -> str:
    """Return the digest of ``model``. Raises UserError when it is not the theta(0) that theta0.json
    remembers, or when there is none, unless it ``may_be_new``: at the start of a run."""
    path, found = run.init / _FILE, weights_digest(model)
    if may_be_new and not path.exists():
        return found
    if lineage(run) != found:
        raise UserError(
            f"theta(0) drawn again differs from the one that {path} remembers: the key or the "
            "seed was changed, or this version of transformers builds another model; use what the "
            "run was started with"
        )
    return found


def is_known(run: RunDir) -> bool:
    return (run.init / _FILE).exists()


def remember(run: RunDir, digest: str, init: Init) -> None:
    """Write theta0.json, with the ``digest`` of ``check``, where it is missing or of an older
    pmp-ds."""
    if _remembered(run).get("format_version") == formats.current("theta0"):
        return
    values = {
        "format_version": formats.current("theta0"),
        "sha256": digest,
        _CHECK: _check_value(init) if isinstance(init, Secret) else None,
        _SEAL: _seal(init, digest) if isinstance(init, Secret) else None,
    }
    write_json(run.init / _FILE, values, private=True)


def lineage(run: RunDir) -> str:
    """The digest of theta(0): of which initial weights a run's checkpoints are. Private."""
    found = _remembered(run).get("sha256")
    if not isinstance(found, str):
        raise UserError(
            f"{run.init / _FILE} is missing or damaged: put it back from a backup, or let "
            "pmp-ds pretrain write it again; nothing else says which initial weights are this "
            "run's"
        )
    return found


def proven_lineage(run: RunDir) -> str:
    """``lineage``, after a check against the run's key; of a run with secret initial weights.

    A run of an older pmp-ds has no seal: then theta(0) is drawn again, which takes a while. Raises
    UserError when the file was altered.
    """
    key, found = require_key(run), lineage(run)
    seal = _remembered(run).get(_SEAL)
    if seal is None:
        config = load_config(run)
        return check(run, draw(config, read_data(run), key))
    if not hmac.compare_digest(str(seal), _seal(key, found)):
        raise UserError(
            f"{run.init / _FILE} was altered: its digest is not the one that was sealed with the "
            "run's key, so nobody can say what else left from these initial weights; put it back "
            "from a backup"
        )
    return found


def _remembered(run: RunDir) -> dict[str, Any]:
    """Return the content of theta0.json, empty where there is none."""
    path = run.init / _FILE
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        formats.require("theta0", path, values.get("format_version", 1), way_out="use that version")
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}): bring it back from a backup") from None
    return values
