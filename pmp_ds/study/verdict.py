"""What the six numbers mean, in sentences."""

from collections.abc import Iterator

from pmp_ds.study.headline import MATCHED, Contrast, Headline
from pmp_ds.study.runs import AVERAGE, CONTINUED, LM, digits, unit
from pmp_ds.study.statistics import Estimate


def mean(estimate: Estimate, column: str) -> str:
    """Return `+1.20 points`."""
    return f"{estimate.mean:+,.{digits(column)}f} {unit(column)}"


def between(estimate: Estimate, column: str) -> str:
    """Return `[+0.40, +2.00]`, or `one seed`."""
    if estimate.interval is None:
        return "one seed"
    low, high = (f"{end:+,.{digits(column)}f}" for end in estimate.interval)
    return f"[{low}, {high}]"


def _number(estimate: Estimate, column: str) -> str:
    interval = between(estimate, column)
    return f"{mean(estimate, column)} {interval if estimate.interval else f'({interval})'}"


def verdict(six: Headline) -> list[str]:
    """Return the sentences that open the report, the most important first."""
    sentences = [_protection(six, c, e) for c, e in six.gap.main.items()]
    if not sentences:
        return ["No verdict: (i) needs fine-tunes of the arms base and pmp with a common setting."]
    return [*sentences, *_matched_base(six), *_mask(six), *_audit(six)]


def _where(column: str) -> str:
    names = {LM: "Language modelling", CONTINUED: "Continued pretraining", AVERAGE: "GLUE"}
    return names.get(column, column)


def _protection(six: Headline, column: str, gap: Estimate) -> str:
    where, value = _where(column), _number(gap, column)
    if gap.interval is None:
        return f"{where}: no verdict from one seed; the unauthorized gap is {value}."
    if gap.includes_zero:
        found = (
            f"no measurable protection. The unauthorized gap, {value}, includes 0; a gap above "
            f"{gap.interval[1]:.{digits(column)}f} would have been seen."
        )
    elif gap.mean < 0:
        found = (
            "no protection. The PMP model fine-tunes better than BASE: the unauthorized gap is "
            f"{value}."
        )
    elif _matched(six) is False:
        found = f"a gap, but not at matched base loss: {value}. It may be that of a weaker model."
    else:
        found = (
            "measurable protection. Without the mask, the best fine-tune of PMP is worse than "
            f"that of BASE by {value}."
        )
    return f"{where}: {found} {_base(six)}"


def _matched_base(six: Headline) -> Iterator[str]:
    """What (i) comes to against a base of PMP's own loss, where one was trained."""
    arm, found = six.matched or ("", Contrast())
    for column, value in found.main.items():
        what = "measurable protection"
        if value.interval is None:
            what = "no verdict from one seed"
        elif value.includes_zero:
            what = "no measurable protection"
        elif value.mean < 0:
            what = "no protection"
        text = _number(value, column)
        yield f"{_where(column)}, against {arm}, trained to PMP's loss: {what}. The gap is {text}."


def _matched(six: Headline) -> bool | None:
    """Whether the two pretraining losses are alike; None when they are not known."""
    return None if six.capability is None else abs(six.capability.mean) <= MATCHED


def _base(six: Headline) -> str:
    if six.capability is None:
        return "The pretraining losses are not known, so nothing says that the base is matched."
    return (
        f"The base is {'matched' if _matched(six) else 'not matched'}: PMP's pretraining loss "
        f"minus BASE's is {-six.capability.mean:+.4f} nats per token."
    )


def _mask(six: Headline) -> Iterator[str]:
    for column, value in six.secret.main.items():
        where, text = _where(column), _number(value, column)
        if value.interval is None:
            yield f"{where}: the value of the secret is {text}."
        elif value.includes_zero:
            yield (
                f"{where}: knowing the mask is worth nothing measurable. The true mask minus a "
                f"random one is {text}."
            )
        elif value.mean < 0:
            yield f"{where}: a random mask fine-tunes better than the true one: {text}."
        else:
            yield f"{where}: the true mask is worth {text} over a random one."


def _audit(six: Headline) -> Iterator[str]:
    for path, audit in six.audits.items():
        if audit["leaks"]:
            yield f"The mask leaks ({path}): {', '.join(audit['leaks'])}."
