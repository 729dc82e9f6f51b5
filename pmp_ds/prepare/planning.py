"""Decisions before text is packed: the tokenizer, the encoding engine, and the workers' job.

For several machines they are written to `<out>.incomplete/plan.json`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pmp_ds.errors import UserError, quoted
from pmp_ds.foreign import MissingError, read_object
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Unit, group_units
from pmp_ds.prepare.encoder import Encoder, choose_engine
from pmp_ds.prepare.request import Request
from pmp_ds.prepare.sample import require_text, sample_texts, training_texts
from pmp_ds.prepare.saved_tokenizer import about_saved, save_tokenizer
from pmp_ds.prepare.staging import (
    PLAN,
    TOKENIZER,
    read_identity,
    saved_tokenizer_files,
    staging_folder,
)
from pmp_ds.prepare.tokenizer import Tokenizer, load_trained, train_tokenizer
from pmp_ds.prepare.units import PackJob
from pmp_ds.run_dir import write_json


def make_plan(folder: Path, request: Request) -> PackJob:
    """Train the tokenizer if necessary, save it in ``folder`` and choose the engine.

    Raises UserError for text that no tokenizer can be trained on, for a large corpus without any,
    and for a tokenizer without the begin-of-text token that ``bos`` requires.
    """
    sample = sample_texts(request)
    if not sample:
        require_text(request)
    files = saved_tokenizer_files(folder)
    tokenizer = request.tokenizer
    if tokenizer is None and files is not None:
        tokenizer = load_trained(folder / "tokenizer")
    if tokenizer is None:
        size = request.config.train_vocab_size
        tokenizer = train_tokenizer(training_texts(request), size)
    if files is None:
        files = save_tokenizer(tokenizer, folder / "tokenizer", request.config.bos)
        write_json(folder / TOKENIZER, files)
    bos_id = _bos_id(request.config, tokenizer)
    slow = request.config.engine == "reference"
    asked = tokenizer.encoder.without_fast() if slow else tokenizer.encoder
    encoder, warning = choose_engine(asked, sample)
    warnings = [] if warning is None else [warning]
    warnings += about_saved(tokenizer, folder / "tokenizer", sample, bos_id)
    return _job(folder, request, tokenizer, files, encoder, warnings)


def write_plan(job: PackJob, request: Request) -> None:
    """Record what ``read_plan`` needs to create the same job on another machine."""
    plan = {
        "config": dataclasses.asdict(job.config),
        "engine": job.encoder.spec.engine,
        "warnings": job.warnings[len(request.left_out) :],
    }
    write_json(job.folder / PLAN, plan)


def read_plan(out: Path) -> tuple[PackJob, list[Unit]]:
    """Return the job and all units planned for the store ``out``.

    Raises UserError unless this machine matches the plan.
    """
    folder = staging_folder(out)
    try:
        planned = read_object(folder / PLAN)
        config = PrepareConfig(**planned["config"] | {"input": tuple(planned["config"]["input"])})
        engine, warnings = planned["engine"], planned["warnings"]
    except MissingError as error:
        raise UserError(
            f"{folder} contains no plan: run `pmp-ds prepare-data plan "
            f"--out {quoted(out)}` with all settings first, once, and wait until it ends"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / PLAN} cannot be read ({error}); run plan again") from error
    request = Request.of(config)
    _check_same(folder, request)
    files = saved_tokenizer_files(folder)
    if files is None:
        raise UserError(f"{folder}/tokenizer is not as it was planned; run plan again")
    tokenizer = request.tokenizer or load_trained(folder / "tokenizer")
    encoder = tokenizer.encoder
    if encoder.spec.engine != engine:
        encoder = encoder.without_fast()
    job = _job(folder, request, tokenizer, files, encoder, warnings)
    return job, group_units(request.sources)


def _job(
    folder: Path,
    request: Request,
    tokenizer: Tokenizer,
    files: dict[str, str],  # sha256 by name
    encoder: Encoder,
    warnings: Sequence[str],
) -> PackJob:
    identity = hashlib.sha256(json.dumps(request.identity, sort_keys=True).encode()).hexdigest()
    return PackJob(
        config=request.config,
        folder=folder,
        run=f"{identity}-{'reference' if encoder.spec.fast is None else 'fast'}",
        settings=request.settings,
        encoder=encoder,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=_bos_id(request.config, tokenizer),
        tokenizer={
            "engine": encoder.spec.engine,
            "files": files,
            "fingerprint": tokenizer.fingerprint,
            "kind": tokenizer.kind,
        },
        warnings=(*request.left_out, *warnings),
    )


def _bos_id(config: PrepareConfig, tokenizer: Tokenizer) -> int | None:
    if config.bos == "none":
        return None
    name = config.tokenizer or "trained on the input"
    if tokenizer.bos_id is None:
        raise UserError(
            f"bos={config.bos}, but tokenizer {name} has no begin-of-text token: set bos_token in "
            "its tokenizer_config.json, choose another tokenizer, or set bos to none"
        )
    if tokenizer.bos_id == tokenizer.eos_id:
        raise UserError(
            f"bos={config.bos}, but begin and end of text are the same token {tokenizer.eos_id} of "
            f"tokenizer {name}: it would appear twice between documents; set bos to none"
        )
    return tokenizer.bos_id


def _check_same(folder: Path, request: Request) -> None:
    """Raise UserError unless this machine has the files, settings and libraries of the plan."""
    there, here = read_identity(folder) or {}, request.identity
    if there == here:
        return
    words = {"inputs": "input files (names, sizes or dates)", "versions": "library versions"}
    found = [
        f"{words.get(key, key)} are {there.get(key)} in the plan and {here[key]} here"
        for key in here
        if there.get(key) != here[key]
    ]
    raise UserError(
        f"{folder} was planned for something else: {'; '.join(found)}; give every node the "
        "same files and libraries, or run plan again"
    )
