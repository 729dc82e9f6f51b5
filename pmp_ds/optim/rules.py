"""The masked optimizer named by ``train.optimizer``, created from the settings."""

from typing import Any

from pmp_ds.config import Optimizer, TrainConfig
from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.optim.masked_rules import MaskedLion, MaskedSGD

_RULES: dict[Optimizer, type[MaskedOptimizer]] = {
    "adamw": MaskedAdamW,
    "lion": MaskedLion,
    "sgd": MaskedSGD,
}


def rule_of(config: TrainConfig) -> type[MaskedOptimizer]:
    """Return the class of ``train.optimizer``."""
    return _RULES[config.optimizer]


def optimizer_of(
    config: TrainConfig, groups: list[dict[str, Any]], *, compact_master: bool = False
) -> MaskedOptimizer:
    """Return a run's optimizer for its parameter groups, not armed yet."""
    rule: Any = rule_of(config)  # all rules take these arguments
    made: MaskedOptimizer = rule(
        groups, lr=config.lr, compact_master=compact_master, **rule.settings(config)
    )
    return made
