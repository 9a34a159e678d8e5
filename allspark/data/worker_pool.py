"""The processes of a data loader: made, watched while they are waited for, ended with the process that made them."""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from allspark.utils.errors import UserError

TIMEOUT = 600.0  # seconds without a batch after which storage counts as hung
NOT_THEIRS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # ask the run to stop: the main process decides how
LIMITS = {  # what the system says when something runs out -> what it is and the remedy
    "shared memory": "shared memory ran out: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
    "No space left on device": "shared memory ran out: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
    "received 0 items of ancdata": "open files ran out: raise `ulimit -n` or lower data.num_workers",
    "Too many open files": "open files ran out: raise `ulimit -n` or lower data.num_workers",
    "Cannot allocate memory": "memory ran out: lower data.num_workers",
}
LATE = "DataLoader timed out"  # as torch says it
STARTING = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


class WorkerDied(UserError):
    """A worker of a loader was killed, or yields nothing any more; the batches that it was making are lost."""


def make_loader(dataset: Dataset, num_workers: int, *, timeout: float = TIMEOUT, **options: Any) -> DataLoader:
    """A DataLoader whose workers have one thread and leave signals to this process; iterate it by `batches`."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        worker_init_fn=begin,
        generator=torch.Generator(),  # else every epoch takes a number from the generator that dropout uses
        **options,
    )


def begin(worker: int) -> None:
    """A worker's first act. Its end comes with its parent's, or from it."""
    torch.set_num_threads(1)  # workers are the parallelism; threads inside them only get in each other's way
    cv2.setNumThreads(0)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a Ctrl-C is for the foreground's process group
    for name in NOT_THEIRS:  # batch systems send them to every process
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def batches(loader: DataLoader) -> Iterator[Any]:
    """What the loader yields. WorkerDied within seconds where a worker is killed, after its timeout where one hangs."""
    watch = Watch(loader)
    with watch.explained():
        iterator = iter(loader)
        watch.started(iterator)
    while True:
        with watch.explained():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def end_workers(loader: DataLoader) -> None:
    """At once those that stay between epochs; the loader is of no use any more."""
    Watch(loader).end()


class Watch:
    """Looks at a loader's workers while the main process waits for them, and only then.

    torch's own look raises wherever the main process happens to be, in the middle of a step or of a checkpoint.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        kept = getattr(loader, "_iterator", None)  # of persistent workers
        self.workers: list[BaseProcess] = list(getattr(kept, "_workers", ()))

    def started(self, iterator: Any) -> None:
        self.workers = list(getattr(iterator, "_workers", ()))

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """WorkerDied for a death or a limit of the system inside; SIGCHLD is handled as before behind it."""
        try:
            with watching(self.look, self.loader.timeout):  # 0, without workers: never
                self.look()
                yield
        except Exception as error:
            if isinstance(error, OSError | EOFError) and not isinstance(error, TimeoutError):
                self.settle()
            told = None if isinstance(error, UserError) else self.death() or self.meaning(error)
            self.end()  # for a bug in one of them, too: torch asks by a signal that they ignore, and waits
            if told is None:
                raise
            raise WorkerDied(f"data loader: {told}") from None

    def look(self) -> None:
        if told := self.death():
            raise WorkerDied(f"data loader: {told}")

    def settle(self) -> None:
        """What broke is the connection to a worker that is about to end: wait until it has, a second or two."""
        ending = wait([worker.sentinel for worker in self.workers], 1) if self.workers else []
        for worker in self.workers:
            if worker.sentinel in ending:
                worker.join(1)

    def death(self) -> str | None:
        dead = next((worker for worker in self.workers if worker.exitcode not in (None, 0)), None)
        return None if dead is None else story(dead.pid, dead.exitcode)

    def meaning(self, error: Exception) -> str | None:
        """What a user can do about it; None where it is a bug."""
        if LATE in str(error):
            return (
                f"no batch within {self.loader.timeout:g} s from {self.loader.num_workers} workers; is the storage of "
                f"data.data_root slow or gone? Copy the data to a local disk, or raise data.timeout"
            )
        if isinstance(error, OSError) and error.errno in STARTING:
            return f"{self.loader.num_workers} workers cannot be started ({error.strerror}); lower data.num_workers"
        if self.loader.num_workers:
            return next((told for sign, told in LIMITS.items() if sign in str(error)), None)
        return None

    def end(self) -> None:
        for worker in self.workers:
            worker.kill()  # also one that is stopped, or waits for a file


def story(pid: int | None, code: int) -> str:
    if code > 0:
        return f"worker {pid} ended by itself with exit code {code}; try data.num_workers=0 to see why"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    causes = {
        "SIGKILL": "out of memory, or killed by somebody: lower data.num_workers, or ask for more memory",
        "SIGBUS": "shared memory ran out: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
        "SIGSEGV": "a crash in a library that decodes images: data.num_workers=0 shows at which file",
    }
    return f"worker {pid} was ended by {name}; {causes.get(name, 'start again, it resumes')}"


@contextlib.contextmanager
def watching(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `look` when a child ends, also in the middle of a wait, and raise TimeoutError after so many seconds.

    The loader's own time-out does not see a worker that stops in the middle of what it sends. Nothing happens outside
    of the main thread, whose signals are.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return

    def late(*_: object) -> NoReturn:
        raise TimeoutError(LATE)

    before = [signal.signal(signal.SIGCHLD, lambda *_: look()), signal.signal(signal.SIGALRM, late)]
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGCHLD, signal.SIGALRM), before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@atexit.register
def end_all() -> None:
    """multiprocessing asks its daemons politely, by a signal that workers ignore, and would wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would call it a failure
    for child in multiprocessing.active_children():
        if child.daemon and child._parent_pid == os.getpid():  # not in a process that was forked off
            child.kill()
