"""Complete a preparation: check every unit, add up the results, write the manifest."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pmp_ds.data.manifest import SPLITS, read_manifest, write_manifest
from pmp_ds.errors import quoted
from pmp_ds.prepare.corpus import EmptySplit, Rejects, Unfinished, Unit
from pmp_ds.prepare.sample import no_document
from pmp_ds.prepare.units import PackJob, UnitResult, finished_unit, unigram_cross_entropy
from pmp_ds.prepare.workers import available_cores

_NAMED = 8


def complete_store(
    job: PackJob, units: Sequence[Unit], rejects: Rejects | None = None
) -> dict[str, Any]:
    """Write and return the manifest of the combined ``units``; delete shards of no unit.

    ``rejects`` are rows outside all units. Raises ``Unfinished`` that names the missing units, and
    UserError for too many bad rows or an empty split.
    """
    total = _add_up(job, units)
    if rejects is not None:
        total.rejects.merge(rejects)
    total.rejects.check()  # after the ledger is complete: a higher max_malformed is then enough
    known = {shard["file"] for split in SPLITS for shard in total.shards[split]}
    for path in (path for split in SPLITS for path in (job.folder / split).iterdir()):
        if path.relative_to(job.folder).as_posix() not in known:  # left by a killed process
            path.unlink(missing_ok=True)
    _check_not_empty(job, total)
    splits = {
        split: {
            "blocks": sum(shard["rows"] for shard in total.shards[split]),
            "documents": total.documents[split],
            "dropped_tokens": total.dropped[split],
            "shards": total.shards[split],
        }
        for split in SPLITS
    }
    rows = {
        "read": total.rejects.rows,
        "malformed": total.rejects.malformed,
        "empty": total.rejects.empty,
        "rejected": total.rejects.describe(),
    }
    manifest = {
        "block_size": job.config.block_size,
        "bos_id": job.bos_id,
        "dtype": str(job.dtype),
        "eos_id": job.eos_id,
        "rows": rows,
        "settings": job.settings,
        "splits": splits,
        "tokenizer": job.tokenizer,
        "unigram_cross_entropy": unigram_cross_entropy(*total.unigrams),
        "vocab_size": job.vocab_size,
        "warnings": job.warnings,
    }
    write_manifest(job.folder, manifest)
    return read_manifest(job.folder)


def _add_up(job: PackJob, units: Sequence[Unit]) -> UnitResult:
    """Add up the results of all units, few at a time in memory: there may be 10,000."""
    total = UnitResult.nothing(job)
    missing = []
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing releases the interpreter lock
        found = pool.map(functools.partial(finished_unit, job), units)
        for unit, result in zip(units, found, strict=True):
            if result is None:
                missing.append(str(unit.index))
            else:
                total.add(result)
    if missing:
        out = str(job.folder).removesuffix(".incomplete")
        more = "" if len(missing) <= _NAMED else f" and {len(missing) - _NAMED} more"
        raise Unfinished(
            f"{len(missing)} of {len(units)} units are missing in {job.folder}: "
            f"{', '.join(missing[:_NAMED])}{more}; repeat the nodes that did not finish, or pack "
            f"all missing units here: pmp-ds prepare-data pack {quoted(out)}"
        )
    return total


def _check_not_empty(job: PackJob, total: UnitResult) -> None:
    config = job.config
    if not sum(total.documents.values()):
        raise EmptySplit(no_document(config))
    for split, way_out in (
        ("train", "add text, or lower val_fraction or block_size"),
        ("validation", "add text, raise val_fraction, or lower block_size"),
    ):
        if not total.shards[split]:
            raise EmptySplit(
                f"the {split} split of input {', '.join(config.input)} is empty: its "
                f"{total.documents[split]} documents have {total.dropped[split]} tokens, but one "
                f"block takes block_size={config.block_size} "
                f"(val_fraction={config.val_fraction}); {way_out}"
            )
