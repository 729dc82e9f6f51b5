"""What the user named as input: files, folders, patterns, URLs, datasets, or Python itself."""

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pmp_ds.data.corpus import PYTHON, STREAM, Kind, Source, StreamOptions
from pmp_ds.data.readers import topics
from pmp_ds.errors import UserError

SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
_KNOWN = tuple(SUFFIXES)
_PATTERN = frozenset("*?[")
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def find_sources(inputs: Iterable[str], stream: StreamOptions | None = None) -> list[Source]:
    """All input files in the order of ``inputs``; those of a folder or pattern sorted by path.

    Raises UserError for a path that does not exist, a file of an unknown type, a folder or pattern
    without any known file, and a file that is named twice.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == PYTHON:
            sources += _python_sources()
        elif given.startswith(STREAM):
            sources.append(_stream_source(given, stream))
        elif "://" in given:
            sources += _url_sources(given)
        else:
            sources += _path_sources(given)
    seen: dict[tuple[str, Path | str], str] = {}
    for source in sources:
        key = (source.kind, source.url or source.path.resolve())
        if key in seen:
            raise UserError(
                f"input names {source.url or source.path} twice ({seen[key]} and {source.name}): "
                "its documents would count double; name it once"
            )
        seen[key] = source.name
    return sources


def _path_sources(given: str) -> list[Source]:
    root = Path(given)
    if root.is_dir():
        # Compared as text, so that the order is that of the printed names.
        paths = [
            path
            for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix())
            if path.name.endswith(_KNOWN) and path.is_file()
        ]
        if not paths:
            raise UserError(f"input {given} holds no {', '.join(_KNOWN)} file")
        prefix = given.rstrip("/")
        return [
            _file_source(given, f"{prefix}/{path.relative_to(root).as_posix()}", path)
            for path in paths
        ]
    if not root.exists() and _PATTERN & set(given):
        names = [
            name
            for name in sorted(glob.glob(given, recursive=True))
            if name.endswith(_KNOWN) and Path(name).is_file()
        ]
        if not names:
            raise UserError(f"input {given} matches no {', '.join(_KNOWN)} file")
        return [_file_source(given, name, Path(name)) for name in names]
    if not root.exists():
        raise UserError(
            f"input {given} does not exist; name a file, a folder, a pattern, a URL, "
            f"{STREAM}NAME for a Hugging Face dataset, or `{PYTHON}` for the interpreter's own "
            "documentation and sources"
        )
    if not root.name.endswith(_KNOWN):
        raise UserError(f"input {given} is not a {', '.join(_KNOWN)} file or a folder of them")
    return [_file_source(given, given, root)]


def _kind(name: str) -> Kind:
    return next(kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix))


def _file_source(given: str, name: str, path: Path) -> Source:
    facts = path.stat()
    return Source(
        given=given,
        name=name,
        path=path,
        kind=_kind(path.name),
        num_bytes=facts.st_size,
        version=str(facts.st_mtime_ns),
    )


def _url_sources(given: str) -> list[Source]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(given)
        if _PATTERN & set(root):
            paths = sorted(system.glob(root))
        elif system.isdir(root):
            paths = sorted(system.find(root))
        else:
            paths = [root]
            if not root.endswith(_KNOWN):
                raise UserError(f"input {given} is not a {', '.join(_KNOWN)} file or a folder")
        paths = [path for path in paths if path.endswith(_KNOWN)]
        sources = [_url_source(given, system, path) for path in paths]
    except UserError:
        raise
    except Exception as error:  # every file system of fsspec has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"input {given} cannot be read: {reason}") from error
    if not sources:
        raise UserError(f"input {given} holds no {', '.join(_KNOWN)} file")
    return sources


def _url_source(given: str, system: Any, path: str) -> Source:
    facts = system.info(path)
    if facts.get("size") is None:
        raise UserError(f"input {given} does not say how large it is; download it first")
    marks = [
        str(facts[key]) for key in ("ETag", "mtime", "LastModified", "created") if key in facts
    ]
    url = str(system.unstrip_protocol(path))
    return Source(
        given=given,
        name=url,
        path=Path(path),
        url=url,
        kind=_kind(path),
        num_bytes=int(facts["size"]),
        version=" ".join(marks),
    )


def _stream_source(given: str, stream: StreamOptions | None) -> Source:
    name = given.removeprefix(STREAM)
    if not name:
        raise UserError(f"input {given!r} names no dataset; write {STREAM}NAME")
    return Source(
        given=given, name=given, path=Path(name), kind="stream", num_bytes=0, stream=stream
    )


def _python_sources() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    documentation = root / "pydoc_data" / "topics.py"
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_STDLIB]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths = sorted(set(paths) - {documentation}, key=lambda path: path.relative_to(root).as_posix())
    num_bytes = sum(len(text) for _, text in topics())
    return [
        Source(
            given=PYTHON,
            name=f"{PYTHON}:topics",
            path=documentation,
            kind="topics",
            num_bytes=num_bytes,
        ),
        *(
            Source(
                given=PYTHON,
                name=f"{PYTHON}:{path.relative_to(root).as_posix()}",
                path=path,
                kind="text",
                num_bytes=path.stat().st_size,
            )
            for path in paths
        ),
    ]
