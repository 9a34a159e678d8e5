"""How a run writes: durable, whole or not at all; which job a folder belongs to; what is said where that fails."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from allspark.utils.errors import UserError

LOCK = ".lock"
PATIENCE = 20.0  # seconds: workers of a run that was killed hold its lock until they notice, up to 5 s


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in here (disk full, quota, size limit, permission) is one that the user can mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}; {free_space(path)}); what was saved before is as "
            f"it was. Make room, or lift the quota or permission, and start the same command again"
        ) from error


def free_space(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free there"
    return "free space unknown"


def replace_file(
    path: Path,
    write: Callable[[BinaryIO], None],
    *,
    verify: Callable[[Path], None] = lambda path: None,
    previous: Path | None = None,
) -> None:
    """Write beside the target, flush to the disk, verify, rename: a reader sees the old file or the new one.

    previous: where the old file is kept. Whatever goes wrong, the temporary file is removed and both are as they were.
    """
    temporary = path.with_suffix(".tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                recorder = Recorder(file)
                try:
                    write(recorder)
                except Exception as error:
                    raise recorder.error or error from None
                file.flush()
                os.fsync(file.fileno())
            verify(temporary)
            with keeping(path, previous) if previous is not None else contextlib.nullcontext():
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


class Recorder:
    """A file that remembers why it could not be written: torch.save turns the reason into one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def keeping(path: Path, previous: Path) -> Iterator[None]:
    """Around the replacement of path: previous is then what path was.

    At no moment are the two names of one file, which a single damage would take both of; where the file system has no
    hard links path is renamed before.
    """
    link = previous.with_suffix(".link")
    link.unlink(missing_ok=True)  # of a run that was killed right here
    try:
        os.link(path, link)
    except FileNotFoundError:
        pass  # nothing was saved yet
    except OSError:
        os.replace(path, previous)
    try:
        yield
    except BaseException:
        link.unlink(missing_ok=True)
        raise
    if link.exists():
        os.replace(link, previous)


def sync_folder(folder: Path) -> None:
    """The renaming itself on the disk, where a folder can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode("utf-8")) and None)


class Hold:
    """A run's folder belongs to one job at a time. active: whether this process is the one that holds it (process 0).

    A folder that holds nothing but the lock in the end, because the run never began, is removed again.
    """

    def __init__(self, folder: Path, *, active: bool = True, patience: float = PATIENCE) -> None:
        self.folder, self.active, self.patience = folder, active, patience
        self.lock: FileLock | None = None

    def __enter__(self) -> Hold:
        if self.active:
            self.lock = self.acquire()
        return self

    def acquire(self) -> FileLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=self.patience)
        except Timeout:
            raise UserError(
                f"--save-path {self.folder}: in use by another job; which one stands at its start in "
                f"{self.folder / 'train.log'}. Wait for it, end it, or choose another --save-path (if it was killed on "
                f"another node, and this file system has no locks of its own: remove {self.folder / LOCK})"
            ) from None
        except OSError as error:
            raise UserError(
                f"--save-path {self.folder}: cannot be written to ({error.strerror or error}); choose another"
            ) from None
        return lock

    def move_aside(self, aside: Path) -> None:
        """The folder under another name, lock file and all; a new one, held as well, in its place."""
        old = self.lock
        if os.name == "nt":  # a folder with an open file in it keeps its name there
            old.release()
        self.folder.rename(aside)
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
