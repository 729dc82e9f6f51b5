"""Sample a corpus before packing, to train a tokenizer and to compare engines."""

import contextlib
import itertools
from collections.abc import Iterator

from pmp_ds.errors import UserError
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import MalformedError, Rejects, group_units
from pmp_ds.prepare.packing import is_validation
from pmp_ds.prepare.readers import read_documents, read_texts
from pmp_ds.prepare.request import Request
from pmp_ds.progress import Progress

TRAINING_BYTES = 64 << 20
"""Maximum text to train a tokenizer on, spread over all sources."""

_SOURCES = 32
_CHARS = 1 << 18
_DOCUMENT_CHARS = 4_000
_TEXTS = 4096
_BAD_ROWS = 1000  # of a source: a sample reads no further
_PLACES = 1000  # of a corpus, looked at before it is called hopeless
_PLACES_ROWS = 32_000


def training_texts(request: Request) -> Iterator[str]:
    """Yield documents of the train split, from the start of every source in proportion to its size.

    Raises UserError when there is none.
    """
    rejects = Rejects(max_malformed=request.config.max_malformed)
    texts = _training_texts(request, rejects)
    first = next(texts, None)
    if first is None:
        rejects.check()
        raise UserError(no_document(request.config))
    return itertools.chain([first], texts)


def _training_texts(request: Request, rejects: Rejects) -> Iterator[str]:
    config = request.config
    total = sum(source.num_bytes for source in request.sources)
    share = min(1.0, TRAINING_BYTES / max(1, total))
    credit = 0.0
    with Progress("train tokenizer", "B", total, scale=True) as bar:
        for source in request.sources:
            stream = source.kind == "stream"  # its size is unknown
            credit += TRAINING_BYTES if stream else share * source.num_bytes
            for document in read_documents(source, config.text_field, rejects):
                if (stream or share < 1.0) and credit <= 0.0:
                    break
                if not is_validation(document, config.val_fraction):
                    credit -= len(document)
                    yield document.decode("utf-8")
            bar.update(source.num_bytes)


def sample_texts(request: Request) -> list[str]:
    """Return beginnings of documents from all over the corpus, about 256,000 characters and not
    many more than 4,096 texts."""
    chosen = request.sources[:: len(request.sources) // _SOURCES + 1]
    texts: list[str] = []
    for source in chosen:
        room = _CHARS // len(chosen)
        most = len(texts) + max(1, _TEXTS // len(chosen))
        rejects = Rejects(sample_rows=_BAD_ROWS)
        with contextlib.suppress(MalformedError):
            for text in read_texts(source, request.config.text_field, rejects):
                texts.append(text[: min(room, _DOCUMENT_CHARS)])
                room -= len(texts[-1])
                if room <= 0 or len(texts) == most:
                    break
    return texts


def require_text(request: Request) -> None:
    """Raise UserError when places all over a large corpus, 32,000 rows in all, contain no document
    and too many malformed rows: a wrong text_field, found before everything is read. A document
    anywhere leaves the judgement to the end, which counts all rows."""
    config = request.config
    places = [source for unit in group_units(request.sources) for source in unit.sources]
    places = places[:: len(places) // _PLACES + 1]
    total = Rejects(max_malformed=config.max_malformed)
    for source in places:
        rejects = Rejects(sample_rows=-(-_PLACES_ROWS // len(places)))
        with contextlib.suppress(MalformedError):
            if next(read_documents(source, config.text_field, rejects), None) is not None:
                return
        total.merge(rejects)
    if total.rows >= _BAD_ROWS:
        total.check()


def no_document(config: PrepareConfig) -> str:
    """Return the message for input without a usable document."""
    return (
        f"input {', '.join(config.input)} contains no document with text; name files that do, "
        "or add text"
    )
