"""Turn text into a packed store, as pmp-ds prepare-data does.

Everything is written to `<out>.incomplete` and renamed at the end. So a killed run leaves no half
store, and the same command resumes with the missing units.
"""

import time
from collections.abc import Iterable

from pmp_ds.prepare.complete import complete_store
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects, Unit, group_units
from pmp_ds.prepare.nodes import pack_missing
from pmp_ds.prepare.planning import make_plan
from pmp_ds.prepare.request import Request
from pmp_ds.prepare.staging import (
    exists,
    matching_manifest,
    publish,
    remove_leftovers,
    staging,
    writing,
)
from pmp_ds.prepare.streams import spooled
from pmp_ds.prepare.summary import PrepareSummary


def prepare(config: PrepareConfig) -> PrepareSummary:
    """Make the store ``config.out``, or return at once when it is complete with these settings.

    This is ``plan``, ``pack`` on a single node and ``finish`` of nodes.py, including streams.
    Raises UserError for an input, tokenizer or folder that cannot be used; nothing is left behind.
    """
    start = time.monotonic()
    request = Request.of(config)
    out = request.out
    if exists(out):
        manifest = matching_manifest(out, request.settings)
        remove_leftovers(out)
        return PrepareSummary(folder=out, reused=True, manifest=manifest)
    with writing(out), staging(out, request.identity) as folder:
        job = make_plan(folder, request)
        rejects = Rejects(max_malformed=config.max_malformed)
        units: Iterable[Unit] = group_units(request.sources)
        if request.stream is not None:
            units = spooled(units, folder / "spool", config.text_field, rejects)
        seen, _ = pack_missing(job, units, "tokenize and pack")
        manifest = complete_store(job, seen, rejects)
        publish(folder, out)
    return PrepareSummary(
        folder=out, reused=False, manifest=manifest, seconds=time.monotonic() - start
    )
