"""The interface of an attack, its result, and the verdict."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pmp_ds.audit.case import Case
from pmp_ds.audit.measure import auc, chance_iou, recovered_iou

MARGIN = 0.02
"""Minimum excess of AUC or IoU over chance for an attack to count as better than chance."""

Verdict = Literal["leak", "open", "chance", "no answer", "not run"]
WORDS = {
    "leak": "LEAK",
    "open": "open",
    "chance": "at chance",
    "no answer": "no ticket to compare",
    "not run": "not run",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of an attack."""

    note: str
    scores: torch.Tensor | None = None
    """(n,) fp32 over the case's sample: higher is more likely in the ticket."""

    evidence: bool | None = None
    """Proof of a leak that needs no ticket, its absence, or None for no statement."""

    only: torch.Tensor | None = None
    """(n,) bool: the elements covered by the attack; None for all."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One row of the table."""

    name: str
    needs: str
    run: Callable[[Case], Finding]
    inputs: Sequence[str] = ()
    """Fields of ``Case`` without which it does not run."""

    preventable: bool
    """Whether success is a mistake in the release, not a limit of the method."""

    countermeasure: str
    use_quota: bool = True
    """Whether to rank inside tensors if the recipe gives all tensors the same share."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of audit.json; rates are None if they were not measured."""

    attack: str
    needs: str
    verdict: Verdict
    auc: float | None = None
    auc_outside_embeddings: float | None = None
    iou: float | None = None
    chance_iou: float | None = None
    preventable: bool
    countermeasure: str
    note: str
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_attacks(attacks: Iterable[Attack], case: Case) -> Iterator[Result]:
    """Yield the result of each attack in turn."""
    for attack in attacks:
        start = time.monotonic()
        common: dict[str, Any] = {
            "attack": attack.name,
            "needs": attack.needs,
            "preventable": attack.preventable,
            "countermeasure": attack.countermeasure,
        }
        missing = [name for name in attack.inputs if getattr(case, name) is None]
        if missing:
            flags = ", ".join(f"--{name}" for name in missing)
            yield Result(**common, verdict="not run", note=f"needs {flags}")
            continue
        finding = attack.run(case)
        rates = _rates(attack, finding, case)
        yield Result(
            **common,
            **rates,
            verdict=_verdict(attack, finding, rates),
            note=finding.note,
            seconds=round(time.monotonic() - start, 2),
        )


def _rates(attack: Attack, finding: Finding, case: Case) -> dict[str, Any]:
    if finding.scores is None or case.mask is None:
        return {}
    labels, outside = case.labels(case.mask), case.outside_embeddings()
    scores = case.by_tensor(finding.scores) if attack.use_quota else finding.scores
    if finding.only is not None:
        labels, outside, scores = (part[finding.only] for part in (labels, outside, scores))
    return {
        "auc": auc(scores, labels),
        "auc_outside_embeddings": auc(scores[outside], labels[outside]),
        "iou": recovered_iou(scores, labels),
        "chance_iou": chance_iou(labels),
    }


def _verdict(attack: Attack, finding: Finding, rates: dict[str, Any]) -> Verdict:
    if finding.evidence:
        return "leak"
    if not rates:
        return "chance" if finding.evidence is False else "no answer"
    area, iou, chance = rates["auc"], rates["iou"], rates["chance_iou"]
    if area is None or iou is None or chance is None:  # the ticket contains all of them, or none
        return "chance"
    if area <= 0.5 + MARGIN and iou <= chance + MARGIN:
        return "chance"
    return "leak" if attack.preventable else "open"
