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
    """read(), repeated after each of `waits` while it fails because of an OSError with an errno of TRANSIENT.

    Returns:
        What `read` returns. The last attempt's error is raised as it is.
    """
    for seconds in waits:
        try:
            return read()
        except Exception as error:
            if getattr(system_error(error), "errno", None) not in TRANSIENT:
                raise
        time.sleep(seconds)
    return read()


def system_error(error: BaseException | None) -> OSError | None:
    """The system's error that an exception is or was raised for; None if there is none. zipfile hides some."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__context__
    return error
