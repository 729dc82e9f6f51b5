"""The names and defaults of the optimizers; their updates are in pmp_ds.optim.

A new one is a ``Rule`` in ``RULES``. Nothing here imports torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One value of ``train.optimizer``."""

    name: str
    title: str
    """The name in a model card."""

    betas: tuple[float, float]
    """The default of ``train.betas``."""

    module: str
    """The module of its class, a ``MaskedOptimizer``."""

    optimizer: str
    """The name of that class."""


_ALL = (
    Rule("adamw", "AdamW", (0.9, 0.999), "pmp_ds.optim.masked_adamw", "MaskedAdamW"),
    Rule("lion", "Lion", (0.9, 0.99), "pmp_ds.optim.masked_rules", "MaskedLion"),
    Rule("sgd", "SGD with momentum", (0.9, 0.0), "pmp_ds.optim.masked_rules", "MaskedSGD"),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}
