"""Number of hypothesis examples: few in `make test`, more in `make nightly`, set by EXAMPLES."""

import os
from typing import Any

from hypothesis import settings

TIMES = int(os.environ.get("EXAMPLES", "1"))


def examples(count: int = 100, **more: Any) -> settings:
    """Run ``count`` examples of a test in an ordinary run, without time limits: a busy machine may
    take a second for something that usually takes 1 ms."""
    return settings(max_examples=count * TIMES, deadline=None, **more)
