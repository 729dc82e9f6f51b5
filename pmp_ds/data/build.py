"""Fill a folder with a complete store: tokenize, split, pack, write shards and the manifest."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pmp_ds.data.arrow_store import SPLITS, read_manifest, write_manifest
from pmp_ds.data.corpus import EmptySplit, Rejects, Source, Unit, group_units
from pmp_ds.data.encoder import Encoder, EncoderSpec, choose_engine
from pmp_ds.data.packing import token_dtype
from pmp_ds.data.prepare_config import PrepareConfig
from pmp_ds.data.readers import read_texts
from pmp_ds.data.staging import Request
from pmp_ds.data.streams import spool_units
from pmp_ds.data.tokenizer import Tokenizer, count_mismatches, ids_before, prepend_bos
from pmp_ds.data.units import PackJob, UnitResult, finished_unit, unigram_cross_entropy
from pmp_ds.data.workers import available_cores, pack_units
from pmp_ds.errors import UserError
from pmp_ds.progress import Progress
from pmp_ds.run_dir import fsync_dir

_SAMPLE_SOURCES = 32
_SAMPLE_CHARS = 1 << 18
_SAMPLE_DOCUMENT_CHARS = 4_000


def build_store(
    folder: Path, request: Request, tokenizer: Tokenizer, tokenizer_files: dict[str, str]
) -> dict[str, Any]:
    """Fill ``folder``, which holds the saved tokenizer, and return its manifest.

    Units that an earlier run finished there are kept after a look at their sha256.
    """
    sample = sample_texts(request.sources, request.config)
    encoder, warnings = ready_encoder(request, tokenizer, sample)
    job = packing_job(folder, request, tokenizer, encoder.spec)
    with ThreadPoolExecutor(1) as beside:
        about = beside.submit(about_saved, tokenizer, folder / "tokenizer", sample, job.bos_id)
        workers = request.config.workers or available_cores()
        total = _pack_all(job, encoder, request.sources, workers)
    warnings += about.result()
    return complete_store(job, total, request, tokenizer, tokenizer_files, warnings)


def ready_encoder(
    request: Request, tokenizer: Tokenizer, sample: Sequence[str]
) -> tuple[Encoder, list[str]]:
    """What encodes, and a warning when it is the slower of two."""
    if request.config.engine == "reference":
        return tokenizer.encoder.without_fast(), []
    encoder, warning = choose_engine(tokenizer.encoder, sample)
    return encoder, [] if warning is None else [warning]


def packing_job(
    folder: Path, request: Request, tokenizer: Tokenizer, encoder: EncoderSpec
) -> PackJob:
    """What is the same for all units.

    Raises UserError for a tokenizer without the begin-of-text token that ``bos`` asks for.
    """
    config = request.config
    return PackJob(
        folder=folder,
        run=request.run,
        encoder=encoder,
        eos_id=tokenizer.eos_id,
        bos_id=_bos_id(config, tokenizer),
        vocab_size=tokenizer.vocab_size,
        dtype=str(token_dtype(tokenizer.vocab_size)),
        text_field=config.text_field,
        block_size=config.block_size,
        val_fraction=config.val_fraction,
        max_malformed=config.max_malformed,
    )


def complete_store(
    job: PackJob,
    total: UnitResult,
    request: Request,
    tokenizer: Tokenizer,
    tokenizer_files: dict[str, str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Write and return the manifest of ``total``, which all units gave together; shards that are
    not of it go. Raises UserError for too many bad rows or an empty split.
    """
    total.rejects.check()  # with the ledger in place: another max_malformed mends it
    _remove_strays(job.folder, total)
    _check_not_empty(request.config, total)
    splits = {
        split: {
            "blocks": sum(shard["rows"] for shard in total.shards[split]),
            "documents": total.documents[split],
            "dropped_tokens": total.dropped[split],
            "shards": total.shards[split],
        }
        for split in SPLITS
    }
    write_manifest(
        job.folder,
        {
            "block_size": job.block_size,
            "bos_id": job.bos_id,
            "dtype": job.dtype,
            "eos_id": tokenizer.eos_id,
            "rows": {
                "read": total.rejects.rows,
                "malformed": total.rejects.malformed,
                "empty": total.rejects.empty,
                "rejected": total.rejects.describe(),
            },
            "settings": request.settings,
            "splits": splits,
            "tokenizer": {
                "engine": job.encoder.engine,
                "files": tokenizer_files,
                "fingerprint": tokenizer.fingerprint,
                "kind": tokenizer.kind,
            },
            "unigram_cross_entropy": unigram_cross_entropy(*total.unigrams),
            "vocab_size": tokenizer.vocab_size,
            "warnings": list(warnings),
        },
    )
    return read_manifest(job.folder)


def sample_texts(sources: Sequence[Source], config: PrepareConfig) -> list[str]:
    """Beginnings of documents from all over the corpus, about 256,000 characters."""
    step = len(sources) // _SAMPLE_SOURCES + 1
    chosen = sources[::step]
    texts: list[str] = []
    for source in chosen:
        room = _SAMPLE_CHARS // len(chosen)
        for text in read_texts(source, config.text_field, Rejects(max_malformed=1.0)):
            texts.append(text[: min(room, _SAMPLE_DOCUMENT_CHARS)])
            room -= len(texts[-1])
            if room <= 0:
                break
    return texts


def _pack_all(
    job: PackJob, encoder: Encoder, sources: Sequence[Source], workers: int
) -> UnitResult:
    """Everything that the units gave, in their order."""
    streams = any(source.kind == "stream" for source in sources)
    total = None if streams else sum(source.num_bytes for source in sources)
    results: dict[int, UnitResult] = {}
    unigrams = np.zeros((len(SPLITS), job.vocab_size), np.int64)
    rejects = Rejects(max_malformed=job.max_malformed)
    with Progress("tokenize and pack", "B", total, scale=True) as bar:

        def on_done(unit: Unit, result: UnitResult) -> None:
            np.add(unigrams, result.unigrams, out=unigrams)
            result.unigrams = unigrams  # one array for all: there may be 10,000 units
            results[unit.index] = result
            if unit.spooled:
                unit.sources[0].path.unlink()
            bar.set(documents=sum(sum(r.documents.values()) for r in results.values()))

        def missing() -> Iterator[Unit]:
            for unit in _units(job, sources, rejects):
                result = finished_unit(job, unit)
                if result is None:
                    yield unit
                else:
                    on_done(unit, result)
                    bar.update(unit.num_bytes)

        if not streams:
            workers = min(workers, len(group_units(sources)))
        pack_units(job, encoder, missing(), max(workers, 1), on_done, bar.update)
    merged = UnitResult(unigrams=unigrams, rejects=Rejects(max_malformed=job.max_malformed))
    for index in sorted(results):
        merged.add(results[index])
    merged.rejects.merge(rejects)
    return merged


def _units(job: PackJob, sources: Sequence[Source], rejects: Rejects) -> Iterator[Unit]:
    """All units, numbered; those of a stream as it arrives, with its bad rows in ``rejects``."""
    index = 0
    for group in group_units(sources):
        units: Iterable[Unit] = [dataclasses.replace(group, index=index)]
        if group.sources[0].kind == "stream":
            spool = job.folder / "spool"
            units = spool_units(group.sources[0], index, spool, job.text_field, rejects)
        for unit in units:
            yield unit
            index += 1


def _remove_strays(folder: Path, result: UnitResult) -> None:
    """What killed processes were writing, or left of other text."""
    known = {shard["file"] for split in SPLITS for shard in result.shards[split]}
    for path in (path for split in SPLITS for path in (folder / split).iterdir()):
        if path.relative_to(folder).as_posix() not in known:
            path.unlink(missing_ok=True)


def _check_not_empty(config: PrepareConfig, total: UnitResult) -> None:
    if not sum(total.documents.values()):
        raise EmptySplit(no_document(config))
    inputs = ", ".join(config.input)
    for split, way_out in (
        ("train", "add text, or lower val_fraction or block_size"),
        ("validation", "add text, raise val_fraction, or lower block_size"),
    ):
        if not total.shards[split]:
            raise EmptySplit(
                f"the {split} split of input {inputs} is empty: its {total.documents[split]} "
                f"documents have {total.dropped[split]} tokens and one block takes "
                f"block_size={config.block_size} (val_fraction={config.val_fraction}); {way_out}"
            )


def no_document(config: PrepareConfig) -> str:
    """The message for input without a single usable document."""
    return (
        f"input {', '.join(config.input)} holds no document with text in it; name files that do, "
        "or add text"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, bos: str) -> dict[str, str]:
    """Write the tokenizer's files; return the sha256 of every one by name.

    One that we made the files of puts its begin of text before a text when ``bos`` is `document`,
    as the packed documents have it; somebody's own keeps its ways.
    """
    tokenizer.save_pretrained(folder)
    if bos == "document" and tokenizer.kind != "huggingface" and tokenizer.bos_id is not None:
        prepend_bos(folder, tokenizer.bos_id)
    digests = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    fsync_dir(folder)
    return digests


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
            f"tokenizer {name}: it would stand twice between documents; set bos to none"
        )
    return tokenizer.bos_id


def about_saved(
    tokenizer: Tokenizer, folder: Path, sample: Sequence[str], bos_id: int | None
) -> list[str]:
    """Warnings about the tokenizer saved in ``folder``; a trained one has to be exact."""
    compared, other_ids, other_text = count_mismatches(tokenizer, folder, sample)
    if tokenizer.kind == "trained" and other_ids:
        raise UserError(
            f"AutoTokenizer gives other ids on {other_ids} of {compared} documents than the "
            "tokenizer trained here: this is a bug, please report it"
        )
    warnings = []
    if other_ids:
        warnings.append(
            f"AutoTokenizer on tokenizer/ gives other ids than this {tokenizer.kind} tokenizer "
            f"on {other_ids} of {compared} sampled documents: a release would use the former"
        )
    before = ids_before(folder)
    packed = [] if bos_id is None else [bos_id]
    if before != packed:
        warnings.append(
            f"AutoTokenizer on {folder.name}/ puts the ids {before} before a text by default, the "
            f"packed documents have {packed}: encode prompts as they are packed, or change bos"
        )
    if other_text:
        warnings.append(
            f"{other_text} of {compared} sampled documents do not come back exactly from decode"
        )
    return warnings
