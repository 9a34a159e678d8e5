"""Files that appear completely or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from allspark.utils.errors import UserError

DISK_FULL_ERRNOS = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


@contextmanager
def atomic_path(path: Path, remedy: str, *, suffix: str = ".tmp", durable: bool = False) -> Iterator[Path]:
    """Context manager giving a temporary path beside `path`, which is renamed to `path` at the end.

    If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
        remedy: what the user can do if the file cannot be written; ends the error message.
        suffix: of the temporary file.
        durable: flush file and folder to the disk, so that a crash of the machine leaves the old or the new file.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}{suffix}")  # cut: the name must not get too long
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            with suppress(OSError):  # not all systems can flush a folder
                sync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({os_error_reason(error)}); {remedy}") from None
    finally:
        with suppress(OSError):  # usually gone: renamed
            temporary.unlink()


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, remedy: str) -> None:
    with atomic_path(path, remedy) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def os_error_reason(error: OSError) -> str:
    return "the disk is full" if error.errno in DISK_FULL_ERRNOS else error.strerror or str(error)
