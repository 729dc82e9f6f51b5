"""How much a command says: `--log-level`."""

import logging
from typing import Literal

Level = Literal["debug", "info", "warning"]

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_chosen = logging.INFO


def choose(level: Level) -> None:
    """Set the level of this process; call it before DeepSpeed is imported."""
    global _chosen
    _chosen = _LEVELS[level]


def informs() -> bool:
    """Return whether plan, progress and notes are shown, not only warnings and errors."""
    return _chosen <= logging.INFO


def quieten(name: str) -> None:
    """Hide the messages of a library's logger below an error, or at `debug` show them all."""
    logger = logging.getLogger(name)
    level = logging.DEBUG if _chosen == logging.DEBUG else logging.ERROR
    logger.setLevel(level)
    for handler in logger.handlers:  # DeepSpeed 0.19 sets a level on its handler too
        handler.setLevel(level)
