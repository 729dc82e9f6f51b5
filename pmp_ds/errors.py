"""The one exception that a user's mistake raises, and how a launcher shows it."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend: names the field or file, the value, and the way out."""


def exit_code(main: Callable[[], None]) -> int:
    """Run ``main``; a ``UserError`` becomes one line on standard error and exit code 1.

    Every rank of a run meets the same mistake, so only rank 0 prints it.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
