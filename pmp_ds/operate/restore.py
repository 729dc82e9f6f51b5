"""Write a backup into a run's folder: what is missing is written, nothing is overwritten.

names = missing(backup, run)       raises UserError where the folder has something else
write(backup, run, names)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pmp_ds import strict_yaml
from pmp_ds.errors import UserError
from pmp_ds.foreign import MissingError, read_bytes
from pmp_ds.operate.backup_file import MOST_BYTES, Backup
from pmp_ds.run_dir import RunDir, make_private, write_bytes
from pmp_ds.state import shelf

_APPENDED = ("private/ledger.jsonl", "private/vault/sealed.jsonl")
"""Files that only grow: a longer one in the folder is newer than the backup, and stays."""

_CONFIG = "config.yaml"


def missing(backup: Backup, run: RunDir) -> list[str]:
    """Return the names of the files that ``run`` lacks. Raises UserError that names each one that
    it has with another content, or says that its checkpoints belong to another run."""
    absent, conflicts = [], []
    for name, content in backup.files.items():
        try:
            there = read_bytes(run.root / name, MOST_BYTES)
        except MissingError:
            absent.append(name)
            continue
        newer = name in _APPENDED and there.startswith(content)
        if there == content or newer or (name == _CONFIG and _same_run(there, content)):
            continue
        conflicts.append(name)
    if conflicts:
        raise UserError(
            f"{run.root} has other files than the backup of {backup.run} of {backup.date}: "
            f"{', '.join(conflicts)}. Nothing was changed; restore into another folder, or move "
            "these away if they are damaged"
        )
    _require_same_checkpoints(backup, run)
    return absent


def write(backup: Backup, run: RunDir, names: Sequence[str]) -> None:
    """Write the files ``names``, each whole or not at all, 0600 below private/, and read them
    back. After an interruption the same restore completes. Raises UserError."""
    try:
        run.create()
        for name in backup.files:
            path, private = run.root / name, name.startswith("private/")
            if private:
                make_private(path.parent)
            if name in names:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, backup.files[name], private=private)
                if read_bytes(path, MOST_BYTES) != backup.files[name]:
                    raise UserError(f"{path} was written, but reads differently: check the disk")
            elif private:
                path.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{run.root} cannot be written: {error}; after that is mended, the same command "
            "completes the restore"
        ) from None


def _same_run(there: bytes, content: bytes) -> bool:
    """Return whether two config.yaml differ only in what may change when a run resumes."""
    from pmp_ds.state.run_record import MAY_CHANGE, differing_settings  # imports torch

    try:
        found, ours = (strict_yaml.parse(text.decode()) for text in (there, content))
        return not differing_settings(found, ours, MAY_CHANGE)
    except Exception:  # noqa: BLE001 - not YAML, or not settings
        return False


def _require_same_checkpoints(backup: Backup, run: RunDir) -> None:
    """Raise UserError when a checkpoint there was trained with another ticket or on other data."""
    found, _ = shelf.glance(run, "train")
    if found is None:
        return
    ours = {
        "ticket_id": _field(backup, "private/ticket/ticket.json", "id"),
        "dataset_id": _field(backup, "data.json", "dataset_id"),
    }
    position = asdict(found[1])
    for name, value in ours.items():
        if None not in (value, position[name]) and value != position[name]:
            what = "ticket" if name == "ticket_id" else "data"
            raise UserError(
                f"{found[0]} was trained with another {what} than that of the backup of "
                f"{backup.run}: this is another run; restore into another folder"
            )


def _field(backup: Backup, name: str, field: str) -> Any:
    content = backup.files.get(name)
    return None if content is None else json.loads(content).get(field)
