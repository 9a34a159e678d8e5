"""Running many small tasks in threads, collecting what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from allspark.utils.errors import UserError

THREADS = 8


def usable_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_threads(tasks: Sequence[Callable]) -> list:
    """Run tasks in threads (image decoding releases the GIL) -> the result of each, or the UserError it raised."""

    def run(task: Callable):
        try:
            return task()
        except UserError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, tasks))


def summarize_errors(errors: Sequence[UserError], checked: int) -> str:
    """The first error, and how many more there are among the checked samples."""
    more = f" (and {len(errors) - 1} more of {checked} samples checked)" if len(errors) > 1 else ""
    return f"{errors[0]}{more}"
