"""The masked optimizer named by ``train.optimizer``, created from the settings."""

import importlib
from typing import Any

from pmp_ds.config import TrainConfig
from pmp_ds.config.rules import RULES
from pmp_ds.optim.masked import MaskedOptimizer


def rule_of(config: TrainConfig) -> type[MaskedOptimizer]:
    """Return the class of ``train.optimizer``."""
    rule = RULES[config.optimizer]
    found: type[MaskedOptimizer] = getattr(importlib.import_module(rule.module), rule.optimizer)
    return found


def optimizer_of(
    config: TrainConfig, groups: list[dict[str, Any]], *, compact_master: bool = False
) -> MaskedOptimizer:
    """Return a run's optimizer for its parameter groups, not armed yet."""
    rule: Any = rule_of(config)  # all rules take these arguments
    made: MaskedOptimizer = rule(
        groups, lr=config.lr, compact_master=compact_master, **rule.settings(config)
    )
    return made
