"""A lock on the folder of a run: one job at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

from allspark.utils.errors import UserError

LOCK = ".lock"
TIMEOUT = 20.0  # seconds: the workers of a killed run hold its lock until they notice, up to 5 s


class RunLock:
    """Context that holds the lock of a folder, which is created.

    At the end, a folder that contains nothing but the lock file, because the run never started, is removed again.

    Args:
        folder: of the run.
        active: whether this process takes the lock (process 0).
        timeout: seconds to wait for another job.

    Raises:
        UserError: another job has the lock, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, active: bool = True, timeout: float = TIMEOUT) -> None:
        self.folder, self.active, self.timeout = folder, active, timeout
        self.lock: FileLock | None = None

    def __enter__(self) -> RunLock:
        if self.active:
            self.lock = self.acquire()
        return self

    def acquire(self) -> FileLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=self.timeout)
        except Timeout:
            raise UserError(
                f"--save-path {self.folder}: in use by another job, which is named at its start in "
                f"{self.folder / 'train.log'}. Wait for it, end it, or choose another --save-path (if it was killed on "
                f"another node, and this file system has no locks: remove {self.folder / LOCK})"
            ) from None
        except OSError as error:
            raise UserError(
                f"--save-path {self.folder}: cannot be written to ({error.strerror or error}); choose another"
            ) from None
        return lock

    def move_aside(self, target: Path) -> None:
        """Rename the folder including its lock file, and lock a new folder in its place."""
        old = self.lock
        if os.name == "nt":  # a folder with an open file cannot be renamed there
            old.release()
        try:
            self.folder.rename(target)
        except OSError as error:  # such as EBUSY of a mount point
            raise UserError(
                f"{self.folder}: cannot be moved to {target} ({error.strerror}); choose another --save-path"
            ) from None
        self.lock = self.acquire()
        old.release()

    def __exit__(self, *_) -> None:
        if self.lock is None:
            return
        with contextlib.suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self.lock.release()
