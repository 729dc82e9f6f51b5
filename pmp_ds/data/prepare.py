"""The whole way from text to a packed store: what launcher/prepare_data.py runs.

Everything is written to `<out>.incomplete` and renamed at the end, so a killed run leaves no half
store, and the same command goes on with what is missing.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pmp_ds.config import PrepareConfig
from pmp_ds.data.arrow_store import FORMAT_VERSION, SPLITS, Store, read_manifest
from pmp_ds.data.build import build_store, no_document, save_tokenizer
from pmp_ds.data.corpus import Rejects, Source, StreamOptions, Unfinished
from pmp_ds.data.inputs import find_sources
from pmp_ds.data.packing import is_validation
from pmp_ds.data.readers import read_documents
from pmp_ds.data.summary import PrepareSummary
from pmp_ds.data.tokenizer import Tokenizer, load_tokenizer, load_trained, train_tokenizer
from pmp_ds.errors import UserError
from pmp_ds.progress import Progress
from pmp_ds.run_dir import fsync_dir, write_json

TRAINING_BYTES = 64 << 20
"""Most text that a tokenizer is trained on, spread over all sources."""

_FOLDERS = (*SPLITS, "tokenizer", "units", "spool")
_IDENTITY = "run.json"
_TOKENIZER = "tokenizer.json"
_ENTRIES = {*_FOLDERS, _IDENTITY, _TOKENIZER, "dataset_dict.json", "manifest.json"}
_LIBRARIES = ("gigatoken", "pyarrow", "sentencepiece", "tokenizers")


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Make the store ``config.out``, or return at once when it is complete with these settings.

    Raises UserError for an input, tokenizer or folder that cannot be used; nothing is left behind.
    """
    start = time.monotonic()
    out = Path(config.out)
    sources = find_sources(config.input, _stream_options(config))
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    settings = _settings(config, sources, tokenizer)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        manifest = _matching_manifest(out, settings)
        return _summary(out, manifest, start, reused=True)
    try:
        with _staging(out, _identity(settings, sources, config.engine)) as folder:
            files = _saved_before(folder)
            if tokenizer is None:
                there = folder / "tokenizer"
                tokenizer = _train(sources, config) if files is None else load_trained(there)
            if files is None:
                files = save_tokenizer(tokenizer, folder / "tokenizer")
                write_json(folder / _TOKENIZER, files)
            manifest = build_store(folder, config, sources, tokenizer, files, settings)
            for name in (_IDENTITY, _TOKENIZER):
                (folder / name).unlink(missing_ok=True)
            os.replace(folder, out)
            fsync_dir(out.parent)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error
    return _summary(out, manifest, start, reused=False)


def _stream_options(config: PrepareConfig) -> StreamOptions:
    return StreamOptions(
        split=config.hf_split,
        config=config.hf_config,
        revision=config.hf_revision,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.shuffle_seed,
    )


def _settings(
    config: PrepareConfig, sources: Sequence[Source], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What the content of the store depends on, as far as it is known before reading."""
    inputs = []
    for given in config.input:
        files = [(s.name, s.num_bytes) for s in sources if s.given == given]
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        inputs.append({"input": given, "files": len(files), "names_and_sizes": digest})
    trained = f"trained here with train_vocab_size={config.train_vocab_size}"
    stream = {}
    if any(source.kind == "stream" for source in sources):
        stream = {"stream": dataclasses.asdict(_stream_options(config))}
    return {
        **stream,
        "input": inputs,
        "text_field": config.text_field,
        "tokenizer": trained if tokenizer is None else tokenizer.fingerprint,
        "block_size": config.block_size,
        "val_fraction": config.val_fraction,
    }


def _identity(settings: dict[str, Any], sources: Sequence[Source], engine: str) -> dict[str, Any]:
    """What has to be the same for the finished parts of a killed run to be of use."""
    files = [(s.name, s.num_bytes, s.version) for s in sources]
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "engine": engine,
        "format_version": FORMAT_VERSION,
        "inputs": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "settings": settings,
        "versions": versions,
    }


def _saved_before(folder: Path) -> dict[str, str] | None:
    """The sha256 of the tokenizer files that a killed run saved, if they are there to the byte."""
    try:
        files: dict[str, str] = json.loads((folder / _TOKENIZER).read_text(encoding="utf-8"))
        for name, digest in files.items():
            if hashlib.sha256((folder / "tokenizer" / name).read_bytes()).hexdigest() != digest:
                return None
    except (OSError, ValueError):
        return None
    return files


def _matching_manifest(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the store that is already there; UserError when it is not this one."""
    way_out = "choose another out or delete the folder"
    if not (out / "manifest.json").is_file():
        raise UserError(f"out={out} exists and is not a packed store; {way_out}")
    manifest = read_manifest(out)
    there = manifest.get("settings", {})
    if there != settings:
        differences = [
            f"{name} is {there.get(name)!r} there and {value!r} now"
            for name, value in settings.items()
            if there.get(name) != value
        ]
        raise UserError(f"out={out} holds another store ({'; '.join(differences)}); {way_out}")
    Store.open(out)  # complete, or an error that names what is missing
    return manifest


@contextlib.contextmanager
def _staging(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """`<out>.incomplete`, locked, to be renamed: empty, or as a run of equal ``identity`` left it.

    A mistake of the user removes it, unless units are finished by then: with a setting mended that
    their content does not depend on, the next run uses them. So it does after what a second attempt
    can mend (no space, a lost worker, an interruption).
    """
    folder = out.with_name(out.name + ".incomplete")
    new_parent = not out.parent.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is being written by another run; wait for it") from error
        foreign = {p.name for p in folder.iterdir() if not p.name.endswith(".incomplete")}
        foreign -= _ENTRIES
        if foreign:
            raise UserError(
                f"{folder} holds {sorted(foreign)[0]!r}, which no killed run left; move it away"
            )
        try:
            if not _is_of(folder, identity):
                _clear(folder)
            for name in _FOLDERS:
                (folder / name).mkdir(exist_ok=True)
            write_json(folder / _IDENTITY, identity)
            yield folder
        except Unfinished:
            raise
        except UserError as error:
            finished = len(list((folder / "units").glob("*.json")))
            if finished:
                raise Unfinished(
                    f"{error}; {finished} finished parts are kept in {folder} for the next run"
                ) from error
            shutil.rmtree(folder, ignore_errors=True)
            if new_parent:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    out.parent.rmdir()
            raise
    finally:
        os.close(lock)


def _is_of(folder: Path, identity: dict[str, Any]) -> bool:
    try:
        found = json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == json.loads(json.dumps(identity)))


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def _summary(out: Path, manifest: dict[str, Any], start: float, *, reused: bool) -> PrepareSummary:
    return PrepareSummary(
        folder=out,
        reused=reused,
        manifest=manifest,
        warnings=tuple(manifest["warnings"]),
        seconds=time.monotonic() - start,
    )
