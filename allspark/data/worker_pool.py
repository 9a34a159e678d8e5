"""Data loader workers: created, watched while the main process waits for them, and ended with it."""

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

from allspark.utils.errors import UserError, int_from_env
from allspark.utils.parallel import usable_cores

MAX_WORKERS = 8  # per loader, if data.num_workers is not set
TIMEOUT = 600.0  # seconds without a batch after which the storage counts as hung
IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # requests to stop; the main process handles them
LIMITS = {  # part of the system's message -> cause and remedy
    "shared memory": "out of shared memory: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
    "No space left on device": "out of shared memory: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
    "received 0 items of ancdata": "out of file descriptors: raise `ulimit -n` or lower data.num_workers",
    "Too many open files": "out of file descriptors: raise `ulimit -n` or lower data.num_workers",
    "Cannot allocate memory": "out of memory: lower data.num_workers",
}
TIMEOUT_MESSAGE = "DataLoader timed out"  # torch's own wording
START_ERRNOS = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


class WorkerDied(UserError):
    """A loader worker was killed or hangs; the batches it was preparing are lost."""


def worker_count(requested: int | None) -> int:
    """data.num_workers, or if it is None the usable cores divided among the node's torchrun processes, at most 8.

    (srun gives each process its own cores.)
    """
    if requested is not None:
        return requested
    return max(1, min(MAX_WORKERS, usable_cores() // int_from_env("LOCAL_WORLD_SIZE", 1, least=1)))


def evaluation_workers(requested: int | None) -> int:
    """At most the default number, because the recipe of a checkpoint may be a stranger's."""
    return min(worker_count(requested), worker_count(None))


def make_loader(dataset: Dataset, num_workers: int, *, timeout: float = TIMEOUT, **options: Any) -> DataLoader:
    """A DataLoader whose workers use one thread and leave signals to the main process; use with `iterate`."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        worker_init_fn=init_worker,
        generator=torch.Generator(),  # otherwise each epoch draws from the generator that dropout uses
        **options,
    )


def init_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism; threads inside them would compete
    cv2.setNumThreads(0)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C goes to the foreground process group
    for name in IGNORED_SIGNALS:  # batch systems send them to every process
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def iterate(loader: DataLoader) -> Iterator[Any]:
    """Yield the loader's batches; raise WorkerDied soon after a worker is killed, or when none delivers in time."""
    watch = WorkerWatch(loader)
    with watch.explain_errors():
        iterator = iter(loader)
        watch.workers = list(getattr(iterator, "_workers", ()))
    while True:
        with watch.explain_errors():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def kill_workers(loader: DataLoader) -> None:
    """Kill a loader's persistent workers; the loader cannot be used any more."""
    WorkerWatch(loader).kill()


class WorkerWatch:
    """Checks a loader's workers, but only while the main process waits for them.

    torch's own SIGCHLD handler raises wherever the main process happens to be, e.g. while a checkpoint is written.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        iterator = getattr(loader, "_iterator", None)  # of persistent workers
        self.workers: list[BaseProcess] = list(getattr(iterator, "_workers", ()))

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Raise WorkerDied if a worker dies or a system limit is hit inside the block. Restores the SIGCHLD handler."""
        try:
            with watch_children(self.check, self.loader.timeout):  # timeout is 0 without workers: never
                self.check()
                yield
        except Exception as error:
            if isinstance(error, OSError | EOFError) and not isinstance(error, TimeoutError):
                self.wait_for_exit()
            reason = None if isinstance(error, UserError) else self.find_death() or self.find_cause(error)
            self.kill()  # also after a bug in a worker: torch would ask by a signal that they ignore, and wait
            if reason is None:
                raise
            raise WorkerDied(f"data loader: {reason}") from None

    def check(self) -> None:
        if reason := self.find_death():
            raise WorkerDied(f"data loader: {reason}")

    def wait_for_exit(self) -> None:
        """The connection to a worker broke because it is about to exit: wait for that, up to two seconds."""
        ending = wait([worker.sentinel for worker in self.workers], 1) if self.workers else []
        for worker in self.workers:
            if worker.sentinel in ending:
                worker.join(1)

    def find_death(self) -> str | None:
        dead = next((worker for worker in self.workers if worker.exitcode not in (None, 0)), None)
        return None if dead is None else describe_exit(dead.pid, dead.exitcode)

    def find_cause(self, error: Exception) -> str | None:
        """Cause and remedy; None if the error is a bug."""
        if TIMEOUT_MESSAGE in str(error):
            return (
                f"no batch within {self.loader.timeout:g} s from {self.loader.num_workers} workers; is the storage of "
                f"data.data_root slow or offline? Copy the data to a local disk, or raise data.timeout"
            )
        if isinstance(error, OSError) and error.errno in START_ERRNOS:
            return f"{self.loader.num_workers} workers cannot be started ({error.strerror}); lower data.num_workers"
        if self.loader.num_workers:
            return next((cause for text, cause in LIMITS.items() if text in str(error)), None)
        return None

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()  # SIGKILL also ends one that is stopped or waits for a file


def describe_exit(pid: int | None, code: int) -> str:
    if code > 0:
        return f"worker {pid} exited with code {code}; use data.num_workers=0 to see why"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    causes = {
        "SIGKILL": "out of memory, or killed by someone: lower data.num_workers, or request more memory",
        "SIGBUS": "out of shared memory: enlarge /dev/shm (docker --shm-size) or lower data.num_workers",
        "SIGSEGV": "an image library crashed: data.num_workers=0 shows at which file",
    }
    return f"worker {pid} was killed by {name}; {causes.get(name, 'start again to resume')}"


@contextlib.contextmanager
def watch_children(check: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `check` when a child process ends, even during a wait, and raise TimeoutError after so many seconds.

    The loader's own timeout misses a worker that stops in the middle of sending. Only the main thread has signal
    handlers; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return

    def on_alarm(*_: object) -> NoReturn:
        raise TimeoutError(TIMEOUT_MESSAGE)

    before = [signal.signal(signal.SIGCHLD, lambda *_: check()), signal.signal(signal.SIGALRM, on_alarm)]
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGCHLD, signal.SIGALRM), before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@atexit.register
def kill_daemons() -> None:
    """At exit multiprocessing ends its daemons by a signal that workers ignore, and would wait forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would report a failure
    for child in multiprocessing.active_children():
        if child.daemon and child._parent_pid == os.getpid():  # not in a forked process
            child.kill()
