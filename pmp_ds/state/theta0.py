"""theta(0), the initial weights of a run: drawn from its secret key or public seed, or read from
the folder of init.weights, with the same bits every time.

    private/init/key            32 bytes; created by the first start of a run
    private/init/theta0.json    digest of theta(0), a one-way check value of the key, and a seal
    private/init/config.json    that of init.weights, where it describes the model
"""

import hmac
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pmp_ds import dist, formats
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.foreign import read_object
from pmp_ds.model.base import Base, open_base
from pmp_ds.model.build import model_config
from pmp_ds.model.folder_rules import CONFIG_FILE
from pmp_ds.model.initial import Initial, digest_of
from pmp_ds.model.keys import KEY_FILE, Secret, create_key, derive, load_key
from pmp_ds.model.parameters import ParamInfo, digest, trained_shapes
from pmp_ds.run_dir import RunDir, eventually, read_json, write_json
from pmp_ds.state import shelf
from pmp_ds.state.run_record import DataFacts, load_config, read_data
from pmp_ds.ticket.ticket import has_ticket

_FILE = "theta0.json"
_CHECK = "key_check"
_SEAL = "seal"
_KIND = "digest"
_SOURCE = "source"
_GIVEN = "given"
Init = Secret | int  # a key, or the public seed of paper mode


def architecture(config: Config, data: DataFacts, run: RunDir) -> PreTrainedConfig:
    """Return the Hugging Face config. Raises UserError when model and data do not fit.

    ``model.family: auto`` without a path is the model of ``init.weights``, whose config.json the
    run keeps, so that it resumes without that folder.
    """
    base = Path(config.init.weights) if config.init.weights is not None else None
    if base is not None and not base.is_dir() and not is_known(run):
        raise UserError(
            f"init.weights={base} is not a folder: name one with a config.json and safetensors"
        )
    return model_config(
        config.model,
        vocab_size=data.vocab_size,
        eos_id=data.eos_id,
        bos_id=data.bos_id,
        block_size=data.block_size,
        base=run.init if (run.init / CONFIG_FILE).is_file() else base,
    )


def base_of(config: Config, hf_config: PreTrainedConfig) -> Base | None:
    """Return the opened folder of ``init.weights``, or None if theta(0) is drawn. Raises UserError
    when it is not the model's."""
    if config.init.weights is None:
        return None
    return open_base(Path(config.init.weights), hf_config)


def model_digest(config: Config, data: DataFacts, run: RunDir) -> str:
    """Return ``parameters.digest`` of the configured model, without drawing a weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config, data, run))
    return digest([ParamInfo(n, shape, 0, 0, False) for n, shape in trained_shapes(model).items()])


def init_of(run: RunDir, config: Config, *, may_create: bool = False) -> Init:
    """Return the secret key or public seed of theta(0). Collective.

    The key is checked against theta0.json. With ``may_create``, only at the start of a run, rank 0
    creates a key if nothing of the run depends on an earlier one. Every rank reads the key file
    itself; the key is never sent between ranks. Raises UserError when it is missing, damaged or
    another run's.
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
            f"{path} is missing, but {made} was made with it: restore the run's own key from a "
            "backup, or choose another run.name; a new key would lose these initial weights"
        )
    key = create_key(run.init) if may_create else load_key(run.init)
    check_value = _remembered(run).get(_CHECK)
    if check_value is not None and not hmac.compare_digest(str(check_value), _check_value(key)):
        raise UserError(
            f"{path} is damaged or another run's: it is not the key recorded in "
            f"{run.init / _FILE}; restore the run's own key from a backup"
        )
    return key


def _made_with_key(run: RunDir) -> Path | None:
    """Return a file or folder of this run that can only exist if it had a key, or None."""
    for path in (run.init / _FILE, run.ledger, run.vault):
        if path.exists():
            return path
    if has_ticket(run.ticket):
        return run.ticket
    return run.checkpoints if shelf.has_any(run) else None


def _check_value(key: Secret) -> str:
    """Return a value that identifies the key and reveals nothing else about it (HKDF)."""
    return bytes(derive(key, "key check")).hex()


def _seal(key: Secret, digest: str, *, given: bool) -> str:
    """Return a seal of a digest, and of its being a given one's, that needs the key to compute
    (HMAC-SHA256)."""
    text = f"{digest} {_GIVEN}" if given else digest
    return hmac.digest(bytes(derive(key, "theta0 seal")), text.encode(), "sha256").hex()


def require_key(run: RunDir) -> Secret:
    """Return the run's key after a check against theta0.json; rank 0 alone calls it.

    Runs of an older pmp-ds have no check value; theta(0) is then drawn again, which takes a while.
    Raises UserError.
    """
    key = _key(run, may_create=False)
    if _CHECK not in _remembered(run):
        check(run, initial_of(run, key))
    return key


def initial_of(run: RunDir, init: Init) -> Initial:
    """Return theta(0) of an existing run."""
    config = load_config(run)
    hf_config = architecture(config, read_data(run), run)
    return Initial(hf_config, init, base_of(config, hf_config))


def check(run: RunDir, initial: Initial) -> str:
    """Return the digest of theta(0), which this process computes alone. Raises UserError unless it
    is the one recorded in theta0.json."""
    older = _is_older(run)
    found = initial.older_digest() if older else digest_of([initial.chunk_digests()])
    initial.forget()
    _require_recorded(run, found, initial.base)
    return found


def check_together(run: RunDir, initial: Initial) -> str:
    """Do the same at the start of a run, when theta0.json may be missing, on all ranks, which share
    the work. Of a base that is gone the recorded digest is returned. Collective."""
    if initial.is_gone:
        return dist.on_rank0(lambda: lineage(run))
    if dist.on_rank0(lambda: _is_older(run)):
        found = dist.on_rank0(initial.older_digest)
    else:
        part = dist.rank(), dist.world_size()
        mine = dist.together(lambda: initial.chunk_digests(part), patient=True)
        found = digest_of(dist.all_gather_object(mine))
    initial.forget()
    dist.on_rank0(lambda: _require_recorded(run, found, initial.base) if is_known(run) else None)
    return found


def _is_older(run: RunDir) -> bool:
    """Return whether theta0.json has the digest of an older version."""
    return is_known(run) and _remembered(run).get(_KIND) is None


def _require_recorded(run: RunDir, found: str, base: Base | None) -> None:
    if lineage(run) == found:
        return
    if base is not None:
        raise UserError(
            f"init.weights={base.path} has other weights than this run started from, by the digest "
            f"in {run.init / _FILE}: restore them, or name a folder that has them. Where it has a "
            "checkpoint, the run also resumes if the folder named does not exist"
        )
    raise UserError(
        f"theta(0) drawn again differs from the one recorded in {run.init / _FILE}: the key or "
        "seed was changed, or this version of transformers builds another model; use what the "
        "run was started with"
    )


def is_known(run: RunDir) -> bool:
    return (run.init / _FILE).exists()


def is_given(run: RunDir) -> bool:
    """Return whether theta(0) came from init.weights, so that others may have it."""
    return _remembered(run).get(_SOURCE) == _GIVEN


def remember(run: RunDir, digest: str, init: Init, base: Base | None = None) -> None:
    """Write theta0.json, with the ``digest`` of ``check``, if it is missing or of an older
    version; before it, the config.json of a new run's ``base``."""
    if _remembered(run).get("format_version") == formats.current("theta0"):
        return
    if base is not None and base.opened is not None:
        write_json(run.init / CONFIG_FILE, read_object(base.path / CONFIG_FILE), private=True)
    values = {
        "format_version": formats.current("theta0"),
        "sha256": digest,
        _KIND: None if _is_older(run) else "chunks",
        _SOURCE: "drawn" if base is None else _GIVEN,
        _CHECK: _check_value(init) if isinstance(init, Secret) else None,
        _SEAL: _seal(init, digest, given=base is not None) if isinstance(init, Secret) else None,
    }
    write_json(run.init / _FILE, values, private=True)


def lineage(run: RunDir) -> str:
    """Return the digest of theta(0), which identifies a run's initial weights. Private."""
    found = _remembered(run).get("sha256")
    if not isinstance(found, str):
        raise UserError(
            f"{run.init / _FILE} is missing or damaged: restore it from a backup, or let "
            "pmp-ds pretrain write it again; nothing else identifies this run's initial weights"
        )
    return found


def proven_lineage(run: RunDir) -> str:
    """Return ``lineage`` of a run with secret initial weights, checked against the run's key.

    Runs of an older pmp-ds have no seal; theta(0) is then drawn again, which takes a while. Raises
    UserError when the file was altered.
    """
    key, found = require_key(run), lineage(run)
    seal = _remembered(run).get(_SEAL)
    if seal is None:
        return check(run, initial_of(run, key))
    if not hmac.compare_digest(str(seal), _seal(key, found, given=is_given(run))):
        raise UserError(
            f"{run.init / _FILE} was altered: its digest does not match the seal made with the "
            "run's key, so it is unknown what else was released from these initial weights; "
            "restore it from a backup"
        )
    return found


def _remembered(run: RunDir) -> dict[str, Any]:
    """Return the content of theta0.json, empty if there is none."""
    path = run.init / _FILE
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        formats.require("theta0", path, values.get("format_version", 1), way_out="use that version")
    except TypeError as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a backup") from None
    return values
