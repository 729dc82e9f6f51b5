"""The whole way from text to a packed store: what pmp-ds prepare-data runs.

Everything is written to `<out>.incomplete` and renamed at the end, so a killed run leaves no half
store, and the same command goes on with what is missing.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.prepare.build import build_store, no_document
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects, Source
from pmp_ds.prepare.packing import is_validation
from pmp_ds.prepare.readers import read_documents
from pmp_ds.prepare.saved_tokenizer import save_tokenizer
from pmp_ds.prepare.staging import (
    TOKENIZER,
    Request,
    exists,
    matching_manifest,
    publish,
    remove_leftovers,
    saved_tokenizer_files,
    staging,
)
from pmp_ds.prepare.summary import PrepareSummary
from pmp_ds.prepare.tokenizer import Tokenizer, load_trained, train_tokenizer
from pmp_ds.progress import Progress
from pmp_ds.run_dir import write_json

TRAINING_BYTES = 64 << 20
"""Most text that a tokenizer is trained on, spread over all sources."""


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Make the store ``config.out``, or return at once when it is complete with these settings.

    Raises UserError for an input, tokenizer or folder that cannot be used; nothing is left behind.
    """
    start = time.monotonic()
    request = Request.of(config)
    out = request.out
    if exists(out):
        manifest = matching_manifest(out, request.settings)
        remove_leftovers(out)
        return summarize(out, manifest, None, reused=True)
    try:
        with staging(out, request.identity) as folder:
            tokenizer, files = ready_tokenizer(folder, request)
            manifest = build_store(folder, request, tokenizer, files)
            publish(folder, out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error
    return summarize(out, manifest, time.monotonic() - start, reused=False)


def ready_tokenizer(folder: Path, request: Request) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, trained if need be and saved in ``folder``, and its files' sha256 by name."""
    files = saved_tokenizer_files(folder)
    tokenizer = request.tokenizer
    if tokenizer is None:
        there = folder / "tokenizer"
        tokenizer = (
            _train(request.sources, request.config) if files is None else load_trained(there)
        )
    if files is None:
        files = save_tokenizer(tokenizer, folder / "tokenizer", request.config.bos)
        write_json(folder / TOKENIZER, files)
    return tokenizer, files


def _train(sources: Sequence[Source], config: PrepareConfig) -> Tokenizer:
    rejects = Rejects(max_malformed=config.max_malformed)
    texts = _training_texts(sources, config, rejects)
    first = next(texts, None)
    if first is None:
        rejects.check()
        raise UserError(no_document(config))
    return train_tokenizer(itertools.chain([first], texts), config.train_vocab_size)


def _training_texts(
    sources: Sequence[Source], config: PrepareConfig, rejects: Rejects
) -> Iterator[str]:
    """Documents of the train split, from the start of every source in proportion to its size."""
    total = sum(source.num_bytes for source in sources)
    share = min(1.0, TRAINING_BYTES / max(1, total))
    credit = 0.0
    with Progress("train tokenizer", "B", total, scale=True) as bar:
        for source in sources:
            # A stream does not say how much there is.
            stream = source.kind == "stream"
            credit += TRAINING_BYTES if stream else share * source.num_bytes
            for document in read_documents(source, config.text_field, rejects):
                if (stream or share < 1.0) and credit <= 0.0:
                    break
                if not is_validation(document, config.val_fraction):
                    credit -= len(document)
                    yield document.decode("utf-8")
            bar.update(source.num_bytes)


def summarize(
    out: Path, manifest: dict[str, Any], seconds: float | None, *, reused: bool
) -> PrepareSummary:
    """The closing report."""
    return PrepareSummary(
        folder=out,
        reused=reused,
        manifest=manifest,
        warnings=tuple(manifest["warnings"]),
        seconds=seconds,
    )
