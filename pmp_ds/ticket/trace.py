"""Whose copy leaked? From a leaked ticket, or from a model that was fine-tuned with one.

A copy lacks its recipient's marks (watermark.py), so its holder's models never change them. The
marks of everyone else are a random sample of the ticket, drawn from a key that nobody outside
knows; so, whatever was done to the leak, the number of them that it lacks is hypergeometric. The
tail of that distribution is exactly the chance of accusing an innocent recipient.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pmp_ds.errors import UserError
from pmp_ds.model.folder import open_tensors, shape_of
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.ticket.watermark import Marks, markable

ALPHA = 1e-6
"""Recipients are named below this chance that any innocent one would be."""

Observation = tuple[str, torch.Tensor, torch.Tensor]
"""Parameter, (numel,) bool: elements that can tell, (numel,) bool: elements that the leak lacks."""


@dataclass(frozen=True)
class Evidence:
    """How much of one recipient's watermark a leak lacks."""

    num_marks: int  # of this recipient, among the elements that can tell
    num_lacking: int  # of these, not in the leaked ticket, or never changed in the model
    population: int  # ticket elements that can tell
    population_lacking: int

    @property
    def expected(self) -> float:
        """``num_lacking`` of an innocent recipient, on average."""
        return self.num_marks * self.population_lacking / max(1, self.population)

    @property
    def log10_p(self) -> float:
        """log10 of the chance that an innocent recipient's marks look at least like this."""
        return log10_tail(
            self.num_lacking, self.num_marks, self.population_lacking, self.population
        )


def log10_tail(found: int, drawn: int, special: int, total: int) -> float:
    """log10 P(at least ``found`` of ``drawn`` are special), drawn without repetition from ``total``
    things of which ``special`` are."""
    most = min(drawn, special)
    least = max(found, drawn - (total - special), 0)
    if least == max(drawn - (total - special), 0):
        return 0.0
    i = torch.arange(least, most + 1, dtype=torch.float64)
    logs = _log_choose(special, i) + _log_choose(total - special, drawn - i)
    return min(0.0, float(logs.logsumexp(0) - _log_choose(total, torch.tensor(drawn)))) / math.log(
        10
    )


def _log_choose(n: int, k: torch.Tensor) -> torch.Tensor:
    n_, k = torch.tensor(float(n), dtype=torch.float64), k.double()
    return torch.lgamma(n_ + 1) - torch.lgamma(k + 1) - torch.lgamma(n_ - k + 1)


def weigh(
    mask: ParamMask, recipients: Mapping[str, Marks], observed: Iterable[Observation]
) -> dict[str, Evidence]:
    """The evidence for each of ``recipients``, given the original ``mask`` and a leak."""
    eligible = markable(mask)
    population = lacking = 0
    marks, found = dict.fromkeys(recipients, 0), dict.fromkeys(recipients, 0)
    for name, telling, absent in observed:
        if name not in eligible:
            continue
        kept = mask.full(name).view(-1) & telling
        population += int(kept.sum())
        lacking += int((kept & absent).sum())
        for who, own in recipients.items():
            places = own[name][telling[own[name]]]
            marks[who] += len(places)
            found[who] += int(absent[places].sum())
    return {who: Evidence(marks[who], found[who], population, lacking) for who in recipients}


def named(evidence: Mapping[str, Evidence]) -> list[str]:
    """Those against whom it is strong: p times the number of recipients is below ALPHA."""
    return [who for who in evidence if corrected(evidence, who) < math.log10(ALPHA)]


def corrected(evidence: Mapping[str, Evidence], who: str) -> float:
    """log10 p after Bonferroni's correction for the number of recipients."""
    return min(0.0, evidence[who].log10_p + math.log10(len(evidence)))


def of_ticket(leaked: ParamMask) -> Iterator[Observation]:
    for name in leaked.shapes:
        kept = leaked.full(name).view(-1)
        yield name, torch.ones_like(kept), ~kept


def of_model(base: Path, tuned: Path, mask: ParamMask) -> Iterator[Observation]:
    """Compare two folders of safetensors. A row in which nothing changed, such as the embedding of
    a token that never came up, tells nothing and is left out; so are parameters that ``tuned``
    lacks or has in another shape. Raises UserError when nothing is left or a file is damaged."""
    before, after = open_tensors(base), open_tensors(tuned)
    mask = fitted_to(mask, base)
    compared = False
    for name, shape in mask.shapes.items():
        if name not in after or shape_of(after, name) != shape:
            continue
        new = after[name].get_tensor(name)
        old = before[name].get_tensor(name).to(new.dtype)  # a change of dtype is no training
        changed = (new != old).view(-1, shape[-1] if shape else 1)
        compared |= bool(changed.any())
        telling = changed.any(dim=1, keepdim=True).expand_as(changed)
        yield name, telling.reshape(-1), ~changed.reshape(-1)
    if not compared:
        raise UserError(
            f"{tuned} and {base} differ in no parameter that both have: is it a fine-tuned copy, "
            "with full weights and the same parameter names?"
        )


def not_in(tuned: Path, mask: ParamMask) -> list[str]:
    """Parameters of ``mask`` that ``tuned`` lacks or has in another shape: they tell nothing."""
    after = open_tensors(tuned)
    return [
        name
        for name, shape in mask.shapes.items()
        if name not in after or shape_of(after, name) != shape
    ]


def fitted_to(mask: ParamMask, model: Path) -> ParamMask:
    """``mask`` on the parameters of a folder of safetensors. Raises UserError when it is another
    model's."""
    handles = open_tensors(model)
    return fitted(mask, {name: shape_of(handles, name) for name in handles}, model)
