"""`pmp-ds vault trace`: whose copy of a ticket leaked, and what copies are marked with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmp_ds import formats
from pmp_ds.errors import UserError, shown
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket import vault

if TYPE_CHECKING:
    from pmp_ds.ticket.mask import ParamMask


def trace(run: RunDir, ticket: Path | None, model: Path | None, base: Path | None) -> None:
    """Print the evidence for each recipient, from a leaked ticket or a model tuned with it."""
    from pmp_ds.ticket import trace, watermark

    if (ticket is None) == (model is None):
        raise UserError("trace what? Give --ticket FOLDER or --model FOLDER")
    own = vault.any_ticket(run.ticket, None)
    copies = vault.records(run.vault)
    marked = [record for record in copies if record.watermark is not None]
    names = {record.watermark: record.name for record in marked if record.by_code}
    if not names and not marked:
        raise UserError(f"no copy of this ticket was sealed with a watermark ({run.vault})")
    secret = secret_of(run, copies)
    code = code_of(own.mask, secret)
    words = {n: watermark.codeword(code, watermark_of(secret, n)[0]) for n in names.values()}
    if ticket is not None:
        leaked = vault.any_ticket(ticket, None)
        if leaked.mask.shapes != own.mask.shapes:
            raise UserError(f"the ticket at {ticket} belongs to another model than the run's")
        observed = trace.of_ticket(leaked.mask)
    else:
        assert model is not None
        base = base or run.release
        mask = trace.fitted_to(own.mask, base)
        observed = trace.of_model(base, model, mask)
        _report_missing(model, mask)
    _report(trace.weigh(own.mask, code, words, observed))
    if older := sorted({record.name for record in marked if not record.by_code}):
        print(
            f"note: the copies for {shown(', '.join(older))} were marked by "
            f"{formats.writer('registry', 2)}, which traces them"
        )
    if any(record.watermark is None for record in copies):
        print("note: copies without a watermark were sealed too; they cannot be traced")


def _report_missing(model: Path, mask: "ParamMask") -> None:
    """Print which parameters give no evidence, because the leaked model lacks them."""
    from pmp_ds.model.folder import few
    from pmp_ds.ticket import trace

    if missing := trace.not_in(model, mask):
        compared = mask.num_params - sum(mask.numel(name) for name in missing)
        print(
            f"note: {model} lacks {few(missing)}, or has them in another shape: {compared:,} of "
            f"{mask.num_params:,} elements ({compared / mask.num_params:.1%}) are compared"
        )


def _report(evidence: Mapping[str, Any]) -> None:
    """Print a line for each recipient, the strongest evidence first, then the verdict."""
    from pmp_ds.ticket.trace import corrected, named

    for who, found in sorted(evidence.items(), key=lambda item: item[1].log10_p):
        print(
            f"{shown(who)}: agrees in {found.num_agreeing:,} of {found.num_places:,} places, score "
            f"{found.score:.0f} (by chance 0, give or take {found.spread:.0f}), "
            f"p <= {_power(found.log10_p)}"
        )
    for who in (guilty := named(evidence)):
        print(
            f"verdict: the copy of {shown(who)}. The chance that this accuses an innocent one of "
            f"{len(evidence)} recipients is at most {_power(corrected(evidence, who))}"
        )
    if len(guilty) > 1:
        print("several are named: what leaked was made from all of their copies")
    if not guilty:
        print("verdict: nobody. The evidence is too weak to name a recipient")


def _power(log10: float) -> str:
    return f"{10**log10:.2g}" if log10 > -3 else f"10^{log10:.1f}"


def secret_of(run: RunDir, known: Sequence[vault.Record], *, may_create: bool = False) -> bytes:
    """Return what watermarks are drawn from: the run's key, or for a run with a public seed a key
    of the vault, made for the first copy with a watermark. Raises UserError when it is not the one
    that earlier copies were marked with."""
    from pmp_ds.model.keys import KEY_FILE, create_key, load_key
    from pmp_ds.state import theta0
    from pmp_ds.state.run_record import load_config

    marked = [record for record in known if record.watermark is not None]
    if load_config(run).init.seed is None:
        folder, secret = run.init, theta0.require_key(run)
    elif may_create and not marked:
        with vault.writing(run.vault):
            vault.begin(run.vault)
            folder, secret = run.vault, create_key(run.vault)
    else:
        folder, secret = run.vault, load_key(run.vault)
    for record in marked:
        if watermark_of(secret, record.name)[1] != record.watermark:
            raise UserError(
                f"{folder / KEY_FILE} is damaged or another run's: the copy for {record.name} was "
                "marked with another key; put the run's own key back from a backup"
            )
    return secret


def code_of(mask: Any, secret: bytes) -> Any:
    """Return the places that copies may lack, the same for all recipients of the ticket."""
    from pmp_ds.model.keys import derive
    from pmp_ds.ticket.watermark import draw_code

    return draw_code(mask, derive(secret, "vault/code"))


def watermark_of(secret: bytes, name: str) -> tuple[bytes, str]:
    """Return the recipient's key and its number; the same name gives the same copy again."""
    from pmp_ds.model.keys import derive

    purpose = f"vault/{name.casefold()}"
    number = bytes(derive(secret, f"{purpose}/number"))[:8].hex()
    return derive(secret, f"{purpose}/codeword"), number
