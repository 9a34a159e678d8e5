"""What a user can mend, told in one message and exit code 2. Everything else is a bug: traceback, exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Names the file or key, the value, and the remedy."""


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) and return its exit code: 0 done, 2 the user can mend it."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
