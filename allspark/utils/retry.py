"""Repeating a read that failed for a reason that passes, as on network file systems."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
WAITS = (0.1, 0.5, 2.0)  # seconds before the second, third and fourth attempt


def retry_transient(read: Callable[[], T], waits: Sequence[float] = WAITS) -> T:
    """read(), repeated after each of `waits` while it raises an OSError with an errno of TRANSIENT.

    Returns:
        What `read` returns. The last attempt's error is raised as it is.
    """
    for seconds in waits:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(seconds)
    return read()
