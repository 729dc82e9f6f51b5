"""The strongest attack: learn from one's own run what kept elements look like, and apply it.

The attacker repeats the recipe with another seed and corpus and knows that run's mask. For each
parameter, a logistic regression of "kept" on features of each element is fitted and applied to the
victim's elements.
"""

import torch

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case, Shadow, Weights
from pmp_ds.audit.training import Gradients, mean_gradient
from pmp_ds.ticket.mask import ParamMask

_FITTED = 1 << 17  # maximum elements of a parameter in a regression
_STEPS = 12  # of Newton's method
_RIDGE = 1e-3
_BATCHES = 32


def shadow_model(case: Case) -> Finding:
    """Score by the fitted probabilities."""
    assert case.shadow is not None
    gradients: list[Gradients | None] = [None, None]
    note = "weights and neighbourhoods"
    if case.text is not None:
        pulls = [
            mean_gradient(weights.model(), case.text, case.seconds / 2, _BATCHES)
            for weights in (case.shadow.weights, case.release)
        ]
        # Numbers of batches may differ, because features are standardised.
        gradients = [pull[0] for pull in pulls]
        note += f", gradients of {min(pull[1] for pull in pulls)} batches"
    parts = [
        _attack(case, case.shadow, name, gradients[0], gradients[1]) for name in case.release.shapes
    ]
    return Finding(note=note, scores=torch.cat(parts))


def _attack(
    case: Case, shadow: Shadow, name: str, own: Gradients | None, other: Gradients | None
) -> torch.Tensor:
    """Return the probabilities of one parameter's sampled elements, (n,) fp32."""
    positions = case.positions(name)
    kept = shadow.mask.full(name)
    labels = kept.reshape(-1)[positions]
    if bool(labels.all()) or not bool(labels.any()):
        return labels.float()
    train = _features(shadow.weights, shadow.mask, name, positions, own, leave_out=True)
    test = _features(case.release, shadow.mask, name, positions, other, leave_out=False)
    # Standardise each set separately: mean and spread differ between the runs.
    train, test = (_standardised(part) for part in (train, test))
    picked = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:_FITTED]
    weights = _logistic(_expanded(train[picked]), labels[picked])
    return torch.cat([_expanded(part) @ weights for part in test.split(_FITTED)]).sigmoid().float()


def _features(
    weights: Weights,
    mask: ParamMask,
    name: str,
    positions: torch.Tensor,
    gradient: Gradients | None,
    *,
    leave_out: bool,
) -> torch.Tensor:
    """Return features, (n, f) fp32. With ``leave_out`` an element's own bit does not count in the
    kept shares of its row and column."""
    size = _matrix(weights.tensor(name).float().abs())
    columns = [size, (size + 1e-4).log(), *_neighbours(size**2)]
    if gradient is not None:
        pull = _matrix(gradient[name].abs())
        columns += [(pull + 1e-12).log(), *_neighbours(pull)]
    bits = _matrix(mask.full(name)).float()
    for axis in (0, 1):
        count, total = bits.shape[axis], bits.sum(axis, keepdim=True)
        columns.append((total - bits) / max(1, count - 1) if leave_out else total / count)
    return torch.stack([c.expand_as(size).reshape(-1)[positions] for c in columns], 1)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1)


def _neighbours(values: torch.Tensor) -> list[torch.Tensor]:
    """Return the log mean of each element's row and column, to be broadcast."""
    return [(values.mean(axis, keepdim=True) + 1e-12).log() for axis in (0, 1)]


def _standardised(features: torch.Tensor) -> torch.Tensor:
    spread = features.std(0)
    return ((features - features.mean(0)) / torch.where(spread > 1e-6, spread, 1.0)).clamp_(-6, 6)


def _expanded(features: torch.Tensor) -> torch.Tensor:
    """Return a constant, the features, and their products, (n, 1 + f + f (f + 1) / 2)."""
    first, second = torch.triu_indices(features.shape[1], features.shape[1])
    products = features[:, first] * features[:, second]
    return torch.cat([torch.ones(len(features), 1), features, products], 1)


def _logistic(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the (f,) weights of a ridge logistic regression, by Newton's method."""
    x, y = features, labels.float()
    weights = torch.zeros(x.shape[1])
    ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(_STEPS):
        p = (x @ weights).sigmoid()
        slope = (x.T @ (y - p)).double() - ridge @ weights.double()
        curve = (x.T @ (x * (p * (1 - p))[:, None])).double() + ridge
        weights = weights + torch.linalg.solve(curve, slope).float()
    return weights


ATTACKS = (
    Attack(
        name="shadow model",
        needs="a PMP run of one's own",
        run=shadow_model,
        inputs=("shadow",),
        preventable=False,
        countermeasure="mask.quota and mask.random_fraction weaken it",
    ),
)
