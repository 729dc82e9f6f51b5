"""The files of a run that go into a backup (backup_file.py), each checked first."""

from collections.abc import Iterator
from pathlib import Path

from pmp_ds.errors import require
from pmp_ds.foreign import read_bytes
from pmp_ds.model.keys import load_key
from pmp_ds.operate.backup_file import MOST_BYTES
from pmp_ds.release import ledger
from pmp_ds.run_dir import RunDir
from pmp_ds.state import theta0
from pmp_ds.state.run_record import load_config, read_data
from pmp_ds.ticket import vault
from pmp_ds.ticket.ticket import has_ticket, load_ticket


def gathered(run: RunDir) -> dict[str, bytes]:
    """Return the files of ``run`` that a backup has, after reading each as its user would. Raises
    UserError when one is damaged or not this run's: a backup of it would save nobody."""
    require(run.private.is_dir(), f"{run.root} is not a run: it has no private folder")
    config = load_config(run)
    read_data(run)
    if config.init.seed is None and theta0.is_known(run):
        theta0.require_key(run)
    elif config.init.seed is None:
        load_key(run.init)
    if has_ticket(run.ticket):
        load_ticket(run.ticket, model_digest=theta0.model_digest(config, read_data(run), run))
    ledger.read(run.ledger)
    vault.records(run.vault)
    return {str(path.relative_to(run.root)): read_bytes(path, MOST_BYTES) for path in _paths(run)}


def _paths(run: RunDir) -> Iterator[Path]:
    """Yield the files in the order in which a restore writes them: config.yaml, which makes a
    folder a run, is last."""
    for folder in (run.init, run.ticket, run.vault):
        yield from sorted(path for path in folder.glob("[!.]*") if path.is_file())
    if run.ledger.exists():
        yield run.ledger
    yield from sorted(path for path in run.tokenizer.rglob("[!.]*") if path.is_file())
    yield from (run.data, run.config)
