"""`<out>.incomplete`, where a store is made, and the conditions for a later process to resume.

    run.json        the identity: values that must not change for finished units to be reused
    tokenizer.json  sha256 of the files in tokenizer/
    plan.json       for several machines: the input of `nodes.pack`
    units/  spool/  the ledger of finished units; units of a stream that wait to be packed

The rest is the store itself.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pmp_ds.data.arrow_store import Store
from pmp_ds.data.manifest import SPLITS, read_manifest
from pmp_ds.errors import UserError
from pmp_ds.fields import fit
from pmp_ds.foreign import ForeignError, read_bytes, read_object
from pmp_ds.lease import Lease, hold
from pmp_ds.prepare.corpus import EmptySplit, Unfinished
from pmp_ds.run_dir import fsync_dir, write_json

TOKENIZER = "tokenizer.json"
PLAN = "plan.json"
_IDENTITY = "run.json"
_FOLDERS = (*SPLITS, "tokenizer", "units", "spool")
_NOT_OF_THE_STORE = (_IDENTITY, TOKENIZER, PLAN, "units", "spool")
_ENTRIES = {*_FOLDERS, *_NOT_OF_THE_STORE, "dataset_dict.json", "manifest.json"}


def staging_folder(out: Path) -> Path:
    return out.with_name(out.name + ".incomplete")


@contextlib.contextmanager
def staging(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Hold `<out>.incomplete`, to be renamed: empty, or left by a run of the same ``identity``.

    A user error removes it, unless units are finished: after a fix to a setting that does not
    affect them, the next run uses them. The same holds after faults that another attempt may
    overcome (no space, a lost worker, an interruption).
    """
    folder = staging_folder(out)
    with held(out):
        folder.mkdir(exist_ok=True)
        foreign = {p.name for p in folder.iterdir() if not p.name.endswith(".incomplete")}
        foreign -= _ENTRIES
        if foreign:
            raise UserError(
                f"{folder} contains {sorted(foreign)[0]!r}, not created by pmp-ds; move it or "
                "choose another out"
            )
        try:
            if read_identity(folder) != identity:
                _clear(folder)
            for name in _FOLDERS:
                (folder / name).mkdir(exist_ok=True)
            write_json(folder / _IDENTITY, identity)
            yield folder
        except Unfinished:
            raise
        except UserError as error:
            finished = len(list((folder / "units").glob("*.json")))
            if finished and not isinstance(error, EmptySplit):
                raise Unfinished(
                    f"{error}; {finished} finished parts are kept in {folder} for the next run"
                ) from error
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError about ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error}") from error


def held(out: Path) -> AbstractContextManager[Lease]:
    """Keep other processes from making the store ``out``. Raises UserError if one is doing so."""
    return hold(out.parent, f"the store {out}", prefix=f"{out.name}.")


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity of the run that wrote ``folder``, or None if it is unreadable."""
    try:
        return read_object(folder / _IDENTITY)
    except ForeignError:
        return None


def saved_tokenizer_files(folder: Path) -> dict[str, str] | None:
    """Return the sha256 of the saved tokenizer files if they are unchanged, else None."""
    try:
        files: dict[str, str] = fit(dict[str, str], read_object(folder / TOKENIZER), folder)
        for name, digest in files.items():
            if hashlib.sha256(read_bytes(folder / "tokenizer" / name)).hexdigest() != digest:
                return None
    except (OSError, ValueError):
        return None
    return files


def publish(folder: Path, out: Path) -> None:
    """Name a complete store, then remove files that only its making needed."""
    os.replace(folder, out)
    fsync_dir(out.parent)
    remove_leftovers(out)


def remove_leftovers(out: Path) -> None:
    """Remove files left in the store by a run that was killed just after the renaming."""
    for name in _NOT_OF_THE_STORE:
        _remove(out / name)


def exists(out: Path) -> bool:
    """Return whether something has the store's name; an empty folder does not count."""
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def matching_manifest(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of the existing store. Raises UserError when it is not this one."""
    way_out = "choose another out or delete the folder"
    if not (out / "manifest.json").is_file():
        raise UserError(f"out={out} exists and is not a packed store; {way_out}")
    manifest = read_manifest(out)
    there = {"bos": "none", **manifest.get("settings", {})}  # older stores do not record bos
    if there != settings:
        differences = [
            f"{name} is {there.get(name)!r} there and {value!r} now"
            for name, value in settings.items()
            if there.get(name) != value
        ]
        raise UserError(f"out={out} contains another store ({'; '.join(differences)}); {way_out}")
    Store.open(out)  # complete, or an error that names what is missing
    return manifest


def _clear(folder: Path) -> None:
    (folder / PLAN).unlink(missing_ok=True)  # first, so that no node begins after this
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
