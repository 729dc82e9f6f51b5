"""The masked optimizer named by ``train.optimizer``, created from the settings."""

import importlib
from typing import Any

from pmp_ds.config import TrainConfig
from pmp_ds.config.moments import moments_of
from pmp_ds.config.rules import RULES
from pmp_ds.optim.kernels.batch import Master
from pmp_ds.optim.masked import MaskedOptimizer


def rule_of(config: TrainConfig) -> type[MaskedOptimizer]:
    """Return the class of ``train.optimizer``."""
    rule = RULES[config.optimizer]
    found: type[MaskedOptimizer] = getattr(importlib.import_module(rule.module), rule.optimizer)
    return found


def optimizer_of(
    config: TrainConfig, groups: list[dict[str, Any]], *, master: Master = "dense"
) -> MaskedOptimizer:
    """Return a run's optimizer for its parameter groups, not armed yet."""
    rule: Any = rule_of(config)  # all rules take these arguments
    made: MaskedOptimizer = rule(
        groups,
        lr=config.lr,
        master=master,
        moment_format=moments_of(config),
        **rule.settings(config),
    )
    return made
