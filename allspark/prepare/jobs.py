"""Writes many small files with several processes, each completely or not at all, so a stopped run can resume."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from allspark.utils.atomic import atomic_path
from allspark.utils.errors import UserError

REMEDY = "free disk space or choose another --out, then run the same command again: finished files are kept"
QUEUED = 4  # tasks per worker that wait with their content in memory
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A file to write.

    Args:
        name: of the source, for messages.
        content: bytes of the source, or the file that has them.
        make: (content, name, *args) -> bytes of the target; raises UserError for bad content. None: copy the content.
    """

    target: Path
    name: str
    content: bytes | Path | None
    make: Callable[..., bytes] | None = None
    args: tuple[Any, ...] = ()


def run_tasks(tasks: Iterable[Task], total: int, workers: int, title: str) -> None:
    """Run all tasks; bad content is reported at the end in one UserError, a full disk stops immediately."""
    results = map(run_task, tasks) if workers == 1 else run_in_processes(tasks, workers)
    problems = [problem for problem in show_progress(results, title, total) if problem is not None]
    if problems:
        more = f" (and {len(problems) - 1} more of {total} files)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}. All other files are done; the same command resumes from there")


def run_task(task: Task) -> str | None:
    """Write the target -> what is wrong with the content, or None. UserError: the target cannot be written."""
    if task.make is None and isinstance(task.content, Path):
        link_file(task.content, task.target)
        return None
    try:
        content = read_file(task.content) if isinstance(task.content, Path) else task.content
        data = content if task.make is None else task.make(content, task.name, *task.args)
    except UserError as error:
        return str(error)
    write_file(task.target, data)
    return None


def run_in_processes(tasks: Iterable[Task], workers: int) -> Iterator[str | None]:
    """The results of run_task as they complete. Tasks are read no faster than they are done."""
    pool = ProcessPoolExecutor(workers, initializer=init_worker)
    pending: set[Future] = set()
    try:
        for task in tasks:
            pending.add(pool.submit(run_task, task))
            if len(pending) >= workers * QUEUED:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(pending))
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, probably out of memory; run the same command again with fewer --workers: "
            "finished files are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def init_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when the parent is killed."""

    def exit_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def write_file(target: Path, data: bytes) -> None:
    with atomic_path(target, REMEDY) as temporary:
        temporary.write_bytes(data)


def link_file(source: Path, target: Path) -> None:
    """Hard-link the file if the file system supports it, else copy it."""
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target, REMEDY) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def show_progress(results: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Pass results on with a progress bar on a terminal, elsewhere with a line after each tenth."""
    bar = tqdm(results, title, total, unit="file", dynamic_ncols=True, disable=None)
    for done, result in enumerate(bar, start=1):
        if not sys.stderr.isatty() and done * 10 // total > (done - 1) * 10 // total:
            print(f"{title}: {done} of {total} files", flush=True)
        yield result
