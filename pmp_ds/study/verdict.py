"""What the six numbers mean, in sentences."""

from collections.abc import Iterator

from pmp_ds.study.headline import MATCHED, Contrast, Headline
from pmp_ds.study.runs import AVERAGE, CONTINUED, LM, is_lm
from pmp_ds.study.statistics import Estimate


def unit(column: str) -> str:
    return "nats per token" if is_lm(column) else "points"


def number(estimate: Estimate, unit: str, digits: int | None = None) -> str:
    """`+1.20 points [0.40, 2.00]`, or with `one seed` for the interval."""
    digits = (4 if "nats" in unit else 2) if digits is None else digits
    value = f"{estimate.mean:+,.{digits}f} {unit}"
    if estimate.low is None or estimate.high is None:
        return f"{value} (one seed)"
    return f"{value} [{estimate.low:+,.{digits}f}, {estimate.high:+,.{digits}f}]"


def verdict(six: Headline) -> list[str]:
    """The sentences that open the report, the most important first."""
    sentences = [_protection(six, c, e) for c, e in six.gap.main.items()]
    if not sentences:
        return ["No verdict: (i) needs fine-tunes of the arms base and pmp with a common setting."]
    return [*sentences, *_matched_base(six), *_mask(six), *_audit(six)]


def _where(column: str) -> str:
    names = {LM: "Language modelling", CONTINUED: "Continued pretraining", AVERAGE: "GLUE"}
    return names.get(column, column)


def _protection(six: Headline, column: str, gap: Estimate) -> str:
    where, value = _where(column), number(gap, unit(column))
    if gap.low is None or gap.high is None:
        return f"{where}: no verdict from one seed; the unauthorized gap is {value}."
    if gap.includes_zero:
        return (
            f"{where}: no measurable protection. The unauthorized gap, {value}, includes 0; a gap "
            f"above {gap.high:.{4 if is_lm(column) else 2}f} would have been seen." + _base(six)
        )
    if gap.mean < 0:
        return (
            f"{where}: no protection. The PMP model fine-tunes better than BASE: the unauthorized "
            f"gap is {value}." + _base(six)
        )
    if _matched(six) is False:
        return (
            f"{where}: a gap, but not at matched base loss: {value}. It may be that of a weaker "
            "model." + _base(six)
        )
    return (
        f"{where}: measurable protection. Without the mask, the best fine-tune of PMP is worse "
        f"than that of BASE by {value}." + _base(six)
    )


def _matched_base(six: Headline) -> Iterator[str]:
    """What (i) comes to against a base of PMP's own loss, where one was trained."""
    arm, found = six.matched or ("", Contrast())
    for column, value in found.main.items():
        what = "no verdict from one seed" if value.low is None else "measurable protection"
        if value.low is not None and value.includes_zero:
            what = "no measurable protection"
        elif value.low is not None and value.mean < 0:
            what = "no protection"
        text = number(value, unit(column))
        yield f"{_where(column)}, against {arm}, trained to PMP's loss: {what}. The gap is {text}."


def _matched(six: Headline) -> bool | None:
    """Whether the two pretraining losses are alike; None when they are not known."""
    return None if six.capability is None else abs(six.capability.mean) <= MATCHED


def _base(six: Headline) -> str:
    matched, capability = _matched(six), six.capability
    if capability is None:
        return " The pretraining losses are not known, so nothing says that the base is matched."
    return (
        f" The base is {'matched' if matched else 'not matched'}: PMP's pretraining loss minus "
        f"BASE's is {-capability.mean:+.4f} nats per token."
    )


def _mask(six: Headline) -> Iterator[str]:
    for column, value in six.secret.main.items():
        text = number(value, unit(column))
        if value.low is None:
            yield f"{_where(column)}: the value of the secret is {text}."
        elif value.includes_zero:
            yield (
                f"{_where(column)}: knowing the mask is worth nothing measurable. The true mask "
                f"minus a random one is {text}."
            )
        elif value.mean < 0:
            yield f"{_where(column)}: a random mask fine-tunes better than the true one: {text}."
        else:
            yield f"{_where(column)}: the true mask is worth {text} over a random one."


def _audit(six: Headline) -> Iterator[str]:
    for path, audit in six.audits.items():
        if audit["leaks"]:
            yield f"The mask leaks ({path}): {', '.join(audit['leaks'])}."
