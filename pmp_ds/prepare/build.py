"""Fill a folder with a complete store: tokenize, split, pack, write shards and the manifest."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pmp_ds.data.manifest import SPLITS, read_manifest, write_manifest
from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import EmptySplit, MalformedError, Rejects, Source, Unit, group_units
from pmp_ds.prepare.encoder import Encoder, EncoderSpec, choose_engine
from pmp_ds.prepare.packing import token_dtype
from pmp_ds.prepare.readers import read_texts
from pmp_ds.prepare.saved_tokenizer import about_saved
from pmp_ds.prepare.staging import Request
from pmp_ds.prepare.streams import spool_units
from pmp_ds.prepare.tokenizer import Tokenizer
from pmp_ds.prepare.units import PackJob, UnitResult, finished_unit, unigram_cross_entropy
from pmp_ds.prepare.workers import available_cores, pack_units
from pmp_ds.progress import Progress

_SAMPLE_SOURCES = 32
_SAMPLE_CHARS = 1 << 18
_SAMPLE_DOCUMENT_CHARS = 4_000
_SAMPLE_TEXTS = 4096


def build_store(
    folder: Path, request: Request, tokenizer: Tokenizer, tokenizer_files: dict[str, str]
) -> dict[str, Any]:
    """Fill ``folder``, which holds the saved tokenizer, and return its manifest.

    Units that an earlier run finished there are kept after a look at their sha256. Packing does not
    wait for the look at the engine: what a refused one packed is packed again.
    """
    asked = _asked_encoder(request, tokenizer)
    guess = packing_job(folder, request, tokenizer, asked.spec)
    with ThreadPoolExecutor(1) as beside:
        sample = beside.submit(sample_texts, request.sources, request.config)
        verdict = beside.submit(lambda: ready_encoder(request, tokenizer, sample.result()))
        about = beside.submit(
            lambda: about_saved(tokenizer, folder / "tokenizer", sample.result(), guess.bos_id)
        )
        total = None
        if not _has_stream(request.sources):  # its units are gone when they are packed
            total = _pack_unless_refused(guess, asked, request, verdict)
        encoder, warnings = verdict.result()
        job = packing_job(folder, request, tokenizer, encoder.spec)
        if total is None:
            total = _pack_all(job, encoder, request)
    return complete_store(
        job, total, request, tokenizer, tokenizer_files, warnings + about.result()
    )


def ready_encoder(
    request: Request, tokenizer: Tokenizer, sample: Sequence[str]
) -> tuple[Encoder, list[str]]:
    """What encodes, and a warning when it is the slower of two."""
    encoder, warning = choose_engine(_asked_encoder(request, tokenizer), sample)
    return encoder, [] if warning is None else [warning]


def _asked_encoder(request: Request, tokenizer: Tokenizer) -> Encoder:
    """What encodes unless ``choose_engine`` objects."""
    slow = request.config.engine == "reference"
    return tokenizer.encoder.without_fast() if slow else tokenizer.encoder


def packing_job(
    folder: Path, request: Request, tokenizer: Tokenizer, encoder: EncoderSpec
) -> PackJob:
    """What is the same for all units.

    Raises UserError for a tokenizer without the begin-of-text token that ``bos`` asks for.
    """
    config = request.config
    return PackJob(
        folder=folder,
        run=f"{request.run}-{'reference' if encoder.fast is None else 'fast'}",
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
            "warnings": [*request.left_out, *warnings],
        },
    )
    return read_manifest(job.folder)


def sample_texts(sources: Sequence[Source], config: PrepareConfig) -> list[str]:
    """Beginnings of documents from all over the corpus, about 256,000 characters, and not many more
    texts than 4,096."""
    step = len(sources) // _SAMPLE_SOURCES + 1
    chosen = sources[::step]
    texts: list[str] = []
    for source in chosen:
        room = _SAMPLE_CHARS // len(chosen)
        most = len(texts) + max(1, _SAMPLE_TEXTS // len(chosen))
        with contextlib.suppress(MalformedError):  # of a thousand rows most: read no further
            for text in read_texts(source, config.text_field, Rejects(max_malformed=0.5)):
                texts.append(text[: min(room, _SAMPLE_DOCUMENT_CHARS)])
                room -= len(texts[-1])
                if room <= 0 or len(texts) == most:
                    break
    return texts


class _RefusedError(Exception):
    """The engine that packs is not to be used."""


def _pack_unless_refused(
    job: PackJob, encoder: Encoder, request: Request, verdict: Future[tuple[Encoder, list[str]]]
) -> UnitResult | None:
    """What ``_pack_all`` gives, or None when the ``verdict`` is for another encoder."""

    def refused() -> bool:
        return verdict.result()[0].spec != encoder.spec

    def stop_if_refused() -> None:
        if verdict.done() and refused():
            raise _RefusedError

    try:
        total = _pack_all(job, encoder, request, stop_if_refused)
    except BaseException as error:
        # A panic of the engine is a BaseException of its own.
        if isinstance(error, KeyboardInterrupt | SystemExit) or not refused():
            raise
        return None
    return None if refused() else total


def _pack_all(
    job: PackJob, encoder: Encoder, request: Request, on_bytes: Callable[[], None] = lambda: None
) -> UnitResult:
    """Everything that the units gave, in their order. Raises what ``on_bytes`` raises, which is
    called often.
    """
    sources = request.sources
    workers = request.config.workers or available_cores()
    streams = _has_stream(sources)
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

        def hear(num_bytes: int) -> None:
            on_bytes()
            bar.update(num_bytes)

        if not streams:
            workers = min(workers, len(group_units(sources)))
        pack_units(job, encoder, missing(), max(workers, 1), on_done, hear)
    merged = UnitResult(unigrams=unigrams, rejects=Rejects(max_malformed=job.max_malformed))
    for index in sorted(results):
        merged.add(results[index])
    merged.rejects.merge(rejects)
    return merged


def _has_stream(sources: Sequence[Source]) -> bool:
    return any(source.kind == "stream" for source in sources)


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
