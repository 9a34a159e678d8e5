"""Files that appear whole or not at all: tables, lists, pictures. (Those of a run are durable, too: engine.files.)"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from allspark.utils.errors import UserError

FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


@contextmanager
def atomic_path(path: Path, remedy: str, suffix: str = ".tmp") -> Iterator[Path]:
    """A place beside `path` to write to, renamed to it at the end; nothing is left of it where that fails.

    UserError: the system does not let it be written, with the remedy.
    """
    beside = path.with_name(f".{path.name[:50]}.{os.getpid()}{suffix}")  # no name is too long that path's is not
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({os_error_reason(error)}); {remedy}") from None
    finally:
        with suppress(OSError):  # as a rule it is gone, renamed
            beside.unlink()


def write_text(path: Path, text: str, remedy: str) -> None:
    with atomic_path(path, remedy) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def os_error_reason(error: OSError) -> str:
    return "the disk is full" if error.errno in FULL else error.strerror or str(error)
