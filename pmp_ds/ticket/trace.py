"""Find whose copy leaked, from a leaked ticket or a model that was fine-tuned with one.

A copy lacks the elements of its recipient's codeword (watermark.py), so models trained with it
never change them. Each recipient gets a score for how well the elements missing from the leak agree
with the codeword, each weighted by its information (the symmetric form of Tardos' score by B.
Skoric, S. Katzenbeisser and M. Celik, Designs, Codes and Cryptography 46, 2008). Codewords of
innocent recipients are independent of the leak, whatever any number of recipients did to it
together. So Chernoff's bound limits the chance that an innocent recipient scores high, without
assumptions.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pmp_ds.errors import UserError
from pmp_ds.model.folder import open_folder, open_tensors, shape_of
from pmp_ds.ticket.fit import fitted
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.ticket.watermark import Code

ALPHA = 1e-6
"""A recipient is named if the chance that any innocent one would be named is below this."""

Observation = tuple[str, torch.Tensor, torch.Tensor]
"""Parameter, (numel,) bool: elements with information, (numel,) bool: elements the leak lacks."""


@dataclass(frozen=True)
class Evidence:
    """The agreement of a leak with one recipient's codeword."""

    num_places: int  # of the code, among the elements with information
    num_agreeing: int  # of these, lacking in both or in neither
    score: float  # 0 on average for an innocent recipient
    spread: float  # standard deviation of an innocent recipient's score
    log10_p: float  # log10 of a bound on the chance that an innocent one scores this much


def resists(places: int, recipients: int) -> int:
    """Return how many recipients may combine their copies while one of them is still named."""
    needed = math.sqrt(2 * math.log(max(1, recipients) / ALPHA)) + 1  # standard deviations
    return int(2 * math.sqrt(places) / (math.pi * needed))


def weigh(
    mask: ParamMask,
    code: Code,
    words: Mapping[str, torch.Tensor],  # (m,) bool each
    observed: Iterable[Observation],
) -> dict[str, Evidence]:
    """Return each recipient's evidence, given codewords, the original ``mask`` and a leak."""
    telling = torch.zeros(len(code), dtype=torch.bool)
    lacking = torch.zeros(len(code), dtype=torch.bool)
    sizes = [len(places) for places in code.places.values()]
    parts = dict(
        zip(code.places, zip(telling.split(sizes), lacking.split(sizes), strict=True), strict=True)
    )
    elsewhere = elsewhere_lacking = 0
    for name, *flags in observed:
        if name not in parts:
            continue
        padding = mask.numel(name) - len(flags[0])  # rows that a release does not have
        can_tell, absent = (torch.nn.functional.pad(flag, (0, padding)) for flag in flags)
        places, (tells, lacks) = code.places[name], parts[name]
        tells.copy_(can_tell[places])
        lacks.copy_(absent[places])
        kept = mask.full(name).view(-1) & can_tell
        elsewhere += int(kept.sum()) - int(tells.sum())
        elsewhere_lacking += int((kept & absent).sum()) - int((tells & lacks).sum())
    noise = elsewhere_lacking / max(1, elsewhere)
    lacks, chances = lacking[telling], code.chances[telling]
    # (m,): a place's contribution to the score of a recipient whose copy lacks it, and has it.
    # Noise explains part of what the leak lacks.
    weight = torch.where(lacks, (1 - noise) / (1 + noise), -1.0)
    if_lacks, if_has = (
        weight * ((1 - chances) / chances).sqrt(),
        -weight * (chances / (1 - chances)).sqrt(),
    )
    spread = float((weight**2).sum().sqrt())
    found = {}
    for who, word in words.items():
        own = word[telling]
        score = float(torch.where(own, if_lacks, if_has).sum())
        found[who] = Evidence(
            num_places=len(own),
            num_agreeing=int((own == lacks).sum()),
            score=score,
            spread=spread,
            log10_p=log10_tail(score, chances, if_lacks, if_has),
        )
    return found


def log10_tail(
    score: float, chances: torch.Tensor, if_true: torch.Tensor, if_false: torch.Tensor
) -> float:
    """Return Chernoff's bound, min over t of E[exp(t (X - score))], on log10 P(sum of X >=
    ``score``). X is ``if_true`` with its chance, else ``if_false``; (m,) each, with mean 0."""
    if not len(chances) or score <= 0:
        return 0.0

    def log_bound(t: float) -> float:
        terms = torch.stack([chances.log() + t * if_true, (1 - chances).log() + t * if_false])
        return float(terms.logsumexp(0).sum()) - t * score

    variance = float((chances * if_true**2 + (1 - chances) * if_false**2).sum())
    low, high = 0.0, 2 * score / max(variance, 1e-300)
    while log_bound(2 * high) < log_bound(high):
        high *= 2
    high *= 2
    for _ in range(40):  # convex in t, and any t gives a bound
        third = (high - low) / 3
        if log_bound(low + third) < log_bound(high - third):
            high -= third
        else:
            low += third
    return min(0.0, log_bound((low + high) / 2)) / math.log(10)


def named(evidence: Mapping[str, Evidence]) -> list[str]:
    """Return recipients with strong evidence: p times the number of recipients is below ALPHA."""
    return [who for who in evidence if corrected(evidence, who) < math.log10(ALPHA)]


def corrected(evidence: Mapping[str, Evidence], who: str) -> float:
    """Return log10 p after Bonferroni's correction for the number of recipients."""
    return min(0.0, evidence[who].log10_p + math.log10(len(evidence)))


def of_ticket(leaked: ParamMask) -> Iterator[Observation]:
    for name in leaked.shapes:
        kept = leaked.full(name).view(-1)
        yield name, torch.ones_like(kept), ~kept


def of_model(base: Path, tuned: Path, mask: ParamMask) -> Iterator[Observation]:
    """Compare two folders of safetensors, where ``mask`` fits ``base`` (``fitted_to``).

    Unchanged rows, such as the embedding of a token that never occurred, carry no information and
    are left out, like parameters that ``tuned`` lacks or has in another shape. Raises UserError
    when nothing is left or a file is damaged.
    """
    before, after = open_tensors(base), open_tensors(tuned)
    compared = False
    for name, shape in mask.shapes.items():
        if name not in after or shape_of(after, name) != shape:
            continue
        new = after[name].get_tensor(name)
        old = before[name].get_tensor(name).to(new.dtype)  # a change of dtype is not training
        changed = (new != old).view(-1, shape[-1] if shape else 1)
        compared |= bool(changed.any())
        telling = changed.any(dim=1, keepdim=True).expand_as(changed)
        yield name, telling.reshape(-1), ~changed.reshape(-1)
    if not compared:
        raise UserError(
            f"{tuned} and {base} share no parameter that differs: is it a fine-tuned copy, "
            "with full weights and the same parameter names?"
        )


def not_in(tuned: Path, mask: ParamMask) -> list[str]:
    """Return parameters of ``mask`` that ``tuned`` lacks or has in another shape."""
    after = open_tensors(tuned)
    return [
        name
        for name, shape in mask.shapes.items()
        if name not in after or shape_of(after, name) != shape
    ]


def fitted_to(mask: ParamMask, model: Path) -> ParamMask:
    """Return ``mask`` on the trained parameters of a release. Raises UserError when it belongs to
    another model, or when the folder does not contain the model of its config.json."""
    folder = open_folder(model)
    found = fitted(mask, folder.trained, model)
    folder.require_names()
    return found
