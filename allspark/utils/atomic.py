"""Files that appear completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from allspark.utils.errors import UserError, reason_of

DISK_FULL_ERRNOS = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
TEMPORARY = ".writing"  # suffix of the folders of atomic_path


@contextmanager
def atomic_path(
    path: Path, remedy: str = "free disk space or choose another path", errors: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Context manager giving a temporary path, which is renamed to `path` at the end.

    If the block raises, the temporary file is removed and `path` is unchanged. The temporary file lies in a folder of
    its own beside `path` and has the same name, because torch and ONNX store the name in the file.

    Args:
        path: file to write.
        remedy: what the user can do if the file cannot be written; ends the error message.
        errors: exceptions, besides OSError, that a library raises if it cannot write the file.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(TEMPORARY, f".{path.name[:50]}.", path.parent) as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    except (OSError, *errors) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else reason_of(error)
        raise UserError(f"{path}: cannot be written ({reason}); {remedy}") from error


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in a folder; no other one may be writing there."""
    for path in folder.glob(f".*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str, remedy: str) -> None:
    with atomic_path(path, remedy) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def os_error_reason(error: OSError) -> str:
    return "the disk is full" if error.errno in DISK_FULL_ERRNOS else error.strerror or str(error)


# The files of a run are also durable: on the disk before anything depends on them


def durable_write(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    verify: Callable[[Path], None] = lambda path: None,
    previous: Path | None = None,
) -> None:
    """Write next to the target, flush to the disk, verify, rename. After an error both files are as before.

    Args:
        path: file to write.
        write: writes the content to an open file.
        verify: raises OSError if the written file is damaged.
        previous: where to keep the replaced file; None discards it.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with wrap_write_errors(path):
        try:
            with open(temporary, "wb") as file:
                recorder = ErrorRecorder(file)
                try:
                    write(recorder)
                except Exception as error:
                    raise recorder.error or error from None
                file.flush()
                os.fsync(file.fileno())
            verify(temporary)
            with replace_keeping_previous(path, previous) if previous is not None else contextlib.nullcontext():
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def durable_write_text(path: Path, text: str) -> None:
    durable_write(path, lambda file: file.write(text.encode("utf-8")))


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, quota, size limit, permission) into a UserError with a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}; {free_space(path)}); files saved earlier are "
            f"unchanged. Free some space, or fix the quota or permission, and run the same command again"
        ) from error


def free_space(path: Path) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB free there"
    return "free space unknown"


class ErrorRecorder:
    """A file that records its OSError, because torch.save raises another exception instead."""

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


@contextmanager
def replace_keeping_previous(path: Path, previous: Path) -> Iterator[None]:
    """Around the replacement of path: keep the old file as `previous`. After an error both files are as before.

    The two names never refer to the same file, so damage to one cannot affect the other. At every moment `path` or
    `previous` is the newest complete file, also if the process is killed. Without hard links both files are renamed
    first, and renamed back after an error.
    """
    spare = previous.with_suffix(".link")
    spare.unlink(missing_ok=True)  # left by a killed run
    linked, renamed = False, []
    try:
        try:
            os.link(path, spare)
            linked = True
        except FileNotFoundError:
            pass  # nothing was saved yet
        except OSError:
            for source, target in ((previous, spare), (path, previous)):
                if source.exists():
                    os.replace(source, target)
                    renamed.append((source, target))
        yield
        if linked:
            renamed.append((path, spare))
            os.replace(spare, previous)
    except BaseException:
        for source, target in reversed(renamed):
            os.replace(target, source)
        spare.unlink(missing_ok=True)
        raise
    with suppress(OSError):
        spare.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the renaming to the disk, where a folder can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
