"""How many examples hypothesis tries: few in `make test`, more in `make nightly`, by EXAMPLES."""

import os
from typing import Any

from hypothesis import settings

TIMES = int(os.environ.get("EXAMPLES", "1"))


def examples(count: int = 100, **more: Any) -> settings:
    """``count`` examples of a test in an ordinary run. None is a matter of time: a busy machine may
    take a second for what usually takes 1 ms."""
    return settings(max_examples=count * TIMES, deadline=None, **more)
