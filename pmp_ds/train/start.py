"""The start of a run that may have started before: where it resumes, and what makes it refuse.

``look`` changes nothing, so a refused start leaves every file as it was. ``go_on`` makes all
changes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pmp_ds import dist
from pmp_ds.errors import UserError
from pmp_ds.log import begin, read_metrics, read_starts
from pmp_ds.model.parameters import digest
from pmp_ds.run_dir import RunDir, sweep
from pmp_ds.state import plain_weights, run_record, shelf, theta0
from pmp_ds.state.manifest import Phase
from pmp_ds.state.shelf import AFRESH, Found, Survey, UnreadableError
from pmp_ds.ticket.ticket import has_ticket, load_ticket
from pmp_ds.train.job import Job

NOTHING = Survey(None, ())


def look(job: Job, phase: Phase, start_afresh: bool) -> Survey:
    """Return the checkpoint from which a phase resumes. Collective. Raises UserError when it does
    not match the data or the ticket, or when checkpoints are lost.

    With ``start_afresh`` lost checkpoints are set aside instead.
    """
    run = job.run
    seen = dist.on_rank0(lambda: _survey(job, phase, start_afresh))
    found = seen.found
    if found is not None and found[1].dataset_id != job.store.dataset_id:
        raise UserError(
            f"data.store={job.config.data.store} is not what this run was trained on: its dataset "
            "id differs from the checkpoint's; restore the data or choose a new run.name"
        )
    if found is not None and found[1].ticket_id is not None:
        _require_ticket(job, f"{found[0]} was trained with it")
    if found is None and run.vault.exists():
        _require_ticket(job, f"copies of it were sealed ({run.vault})")
    dist.on_rank0(lambda: _check_ticket(job, found))
    return seen


def _check_ticket(job: Job, found: Found | None) -> None:
    """Require an existing ticket to be intact and to match the checkpoint."""
    ticket = job.run.ticket
    if not has_ticket(ticket):
        return
    ticket_id = load_ticket(ticket, model_digest=digest(job.table)).id
    if found is not None and found[1].ticket_id != ticket_id:
        raise UserError(
            f"the ticket at {ticket} is not the one that {found[0]} was trained with: restore the "
            "run's own ticket or choose a new run.name"
        )


def _survey(job: Job, phase: Phase, start_afresh: bool) -> Survey:
    """Return ``shelf.survey``, after checks for lost checkpoints; rank 0 alone."""

    def check(seen: Survey) -> None:
        if seen.found is None and (step := _last_saved(job.run, phase)):
            raise UnreadableError(
                f"{job.run.checkpoints} has no checkpoint, but {job.run.metrics} records that one "
                f"was saved at update {step}; nothing was changed: {shelf.WAY_OUT}"
            )

    def before() -> None:
        if phase == "train" and job.config.mask.source != "none":
            _require_ticket(job, f"{job.run.checkpoints} was trained with it")

    return survey_or_afresh(job.run, phase, start_afresh, check, before)


def survey_or_afresh(
    run: RunDir,
    phase: Phase,
    start_afresh: bool,
    check: Callable[[Survey], None] = lambda _: None,
    before: Callable[[], None] = lambda: None,
) -> Survey:
    """Return what ``shelf.survey`` finds and ``check`` accepts; rank 0 alone.

    Raises UnreadableError when checkpoints exist and none is readable. With ``start_afresh`` they
    are set aside instead, unless ``before`` objects.
    """
    try:
        seen = shelf.survey(run, phase)
        check(seen)
    except UnreadableError:
        if not start_afresh:
            raise
        before()
        print(f"{AFRESH}: set aside as {shelf.start_afresh(run)}", flush=True)
        return NOTHING
    if start_afresh and seen.found is not None:
        print(f"{AFRESH} changes nothing: {seen.found[0].name} is readable", flush=True)
    return seen


def _last_saved(run: RunDir, phase: Phase) -> int:
    """Return the last update of a phase whose checkpoint was confirmed, or 0."""
    saved = (r for r in read_metrics(run.metrics) if "save_seconds" in r)
    return max((record["step"] for record in saved if record["phase"] == phase), default=0)


def _require_ticket(job: Job, why: str) -> None:
    ticket = job.run.ticket
    if not has_ticket(ticket):
        raise UserError(
            f"the ticket of this run is missing: {ticket} is empty, but {why}; restore it from a "
            "backup or choose a new run.name"
        )


def go_on(job: Job, seen: Sequence[Survey], last: Mapping[str, int] | None) -> None:
    """Prepare the folder to resume from ``seen``, after the updates ``last``, by phase; None: the
    run has reached its end, and nothing is trained.

    Rank 0 alone; nothing may refuse the start after this.
    """
    run = job.run
    _check_lineage(job, seen[0])
    try:
        resume_in(run, [folder for one in seen for folder in one.passed_over], last)
        theta0.remember(run, job.theta0_digest, job.init, job.initial.base)
    except OSError as error:
        raise UserError(f"{run.root} cannot be written: {error}") from None
    run_record.record_start(run, job.config)


def resume_in(run: RunDir, passed_over: Sequence[Path], last: Mapping[str, int] | None) -> None:
    """Record the start, remove leftovers of killed processes, set damaged checkpoints aside."""
    if last is None:
        read_starts(run.metrics)  # refuses a damaged file, as ``begin`` does
    else:
        begin(run.metrics, last)
    sweep(run)
    for folder in passed_over:
        print(f"set aside as {shelf.set_aside(folder)}", flush=True)
    shelf.mend(run)


def _check_lineage(job: Job, trained: Survey) -> None:
    """If theta0.json is lost, check the key against the weights outside the ticket."""
    if theta0.is_known(job.run) or trained.found is None or not has_ticket(job.run.ticket):
        return
    folder, position = trained.found
    weights = plain_weights.PlainWeights(folder / "weights", position.step, position.val_loss)
    mask = load_ticket(job.run.ticket).mask
    if changed := plain_weights.complement_changes(weights, job.initial, mask):
        raise UserError(
            f"theta0.json is missing from {job.run.init}, and the key, seed or folder in use gives "
            f"{changed:,} weights outside the ticket that differ from those of {folder}: restore "
            "both from a backup"
        )
