"""Find the sources of an input: files, folders, patterns, URLs, datasets, or Python itself."""

import glob
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pmp_ds.errors import UserError
from pmp_ds.prepare.corpus import PYTHON, STREAM, Source, StreamOptions
from pmp_ds.prepare.readers import topics

SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}
"""The kind of a file by its ending."""

_PATTERN = frozenset("*?[")
_SKIPPED_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def find_sources(
    inputs: Iterable[str],
    stream: StreamOptions | None = None,
    notes: list[str] | None = None,  # receives a line on the ignored files of each input
) -> list[Source]:
    """Return all input files in the order of ``inputs``; those of a folder or pattern by path.

    Linked folders are entered, hidden files and folders are not. Raises UserError for a path that
    does not exist, a file of an unknown type, a folder or pattern without a known file, and a file
    or folder that is reached twice.
    """
    sources: list[Source] = []
    notes = [] if notes is None else notes
    for given in inputs:
        if given == PYTHON:
            sources += _python_sources()
        elif given.startswith(STREAM):
            sources.append(_stream_source(given, stream))
        elif "://" in given:
            sources += _url_sources(given, notes)
        else:
            sources += _path_sources(given, notes)
    seen: dict[tuple[str, object], str] = {}
    for source in sources:
        key = (source.kind, source.url or _file_of(source.path))
        if key in seen:
            raise UserError(
                f"input names {source.url or source.path} twice ({seen[key]} and {source.name}), "
                "so its documents would count double; name it once"
            )
        seen[key] = source.name
    return sources


def _file_of(path: Path) -> object:
    """Return the same value for every name of a file: hard and symbolic links are one input."""
    facts = path.stat() if path.exists() else None
    if facts is not None and facts.st_nlink > 1 and facts.st_ino:
        return facts.st_dev, facts.st_ino
    return path.resolve()


def _path_sources(given: str, notes: list[str]) -> list[Source]:
    root = Path(given)
    if root.is_dir():
        prefix = given.rstrip("/")
        # Sort as text, so that the order is that of the printed names.
        names = sorted(path.relative_to(root).as_posix() for path in _files(given, root))
        names = _readable(given, names, notes)
        return [_file_source(given, f"{prefix}/{name}", root / name) for name in names]
    if not root.exists() and _PATTERN & set(given):
        found = (
            name for name in sorted(glob.glob(given, recursive=True)) if not os.path.isdir(name)
        )
        names = _readable(given, found, notes, hidden=False)
        return [_file_source(given, name, Path(name)) for name in names]
    if not root.exists():
        raise UserError(
            f"input {given} does not exist; name a file, a folder, a pattern, a URL, "
            f"{STREAM}NAME for a Hugging Face dataset, or `{PYTHON}` for the interpreter's own "
            "documentation and sources"
        )
    if not root.name.endswith(tuple(SUFFIXES)):
        raise UserError(f"input {given} is not a {', '.join(SUFFIXES)} file or a folder of them")
    return [_file_source(given, given, root)]


def _files(given: str, root: Path) -> Iterator[Path]:
    """Yield all files below ``root``, and hidden folders without their content."""
    reached: dict[tuple[int, int], Path] = {}

    def stop(error: OSError) -> None:
        raise UserError(f"input {given}: {error.filename} cannot be read: {error.strerror}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        facts, here = os.stat(folder), Path(folder)
        first = reached.setdefault((facts.st_dev, facts.st_ino), here)
        if first != here:
            raise UserError(
                f"input {given} reaches {here} twice, the first time as {first}, so its documents "
                "would count double; remove the link"
            )
        yield from (here / name for name in names)
        yield from (here / name for name in subfolders if name.startswith("."))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _readable(
    given: str, names: Iterable[str], notes: list[str], *, hidden: bool = True
) -> list[str]:
    """Return the names of known files and note the others. Raises UserError if there are only
    others. Without ``hidden``, names that begin with a dot were requested."""
    readable: list[str] = []
    left_out: dict[str, list[str]] = {}
    root = Path(given) if hidden else Path()
    for name in names:
        path = Path(name)
        if hidden and path.name.startswith("."):
            left_out.setdefault("hidden", []).append(name)
        elif not name.endswith(tuple(SUFFIXES)):
            left_out.setdefault("of other types", []).append(name)
        elif "://" not in given and not (root / path).is_file():
            raise UserError(f"input {given}: {name} is a link to nothing, or not a file; remove it")
        else:
            readable.append(name)
    lines = []
    for why, others in left_out.items():
        kinds = Counter("".join(Path(name).suffixes[-2:]) or "no suffix" for name in others)
        few = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3))
        lines.append(f"{len(others)} {why} (first: {others[0]}; {few})")
    if not readable:
        raise UserError(
            f"input {given} {'contains' if hidden or '://' in given else 'matches'} no "
            f"{', '.join(SUFFIXES)} file" + (f", but {'; '.join(lines)}" if lines else "")
        )
    notes += [f"input {given}: left out {line}" for line in lines]
    return readable


def _kind(name: str) -> str:
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


def _url_sources(given: str, notes: list[str]) -> list[Source]:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(given)
        if _PATTERN & set(root):
            paths = sorted(system.glob(root))
        elif system.isdir(root):
            paths = sorted(system.find(root))
        else:
            paths = [root]
            if not root.endswith(tuple(SUFFIXES)):
                raise UserError(f"input {given} is not a {', '.join(SUFFIXES)} file or a folder")
        below = {path: path.removeprefix(root.rstrip("/") + "/") for path in paths}
        visible = [path for path, name in below.items() if "/." not in f"/{name}"]
        if len(visible) < len(paths):
            notes.append(f"input {given}: left out {len(paths) - len(visible)} hidden")
        paths = _readable(given, visible, notes, hidden=False)
        sources = [_url_source(given, system, path) for path in paths]
    except UserError:
        raise
    except Exception as error:  # each file system of fsspec has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"input {given} cannot be read: {reason}") from error
    return sources


def _url_source(given: str, system: Any, path: str) -> Source:
    facts = system.info(path)
    if facts.get("size") is None:
        raise UserError(f"input {given} does not report its size; download it first")
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
        found = (Path(folder, name) for name in names if name.endswith(".py"))
        paths += [path for path in found if not path.is_symlink()]  # Debian has a few, to others
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
