"""What a user can mend, told in one message and exit code 2. Everything else is a bug: traceback, exit code 1."""

from __future__ import annotations

import errno
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

BROKEN_PIPE = 141  # the exit code of a program that SIGPIPE ended


STOPPED, INTERRUPTED = 75, 130  # stopped by a signal, saved, start again to go on (EX_TEMPFAIL); by a second Ctrl-C


USER_ERRNOS = {  # what a system says of a file wherever one is touched, and no bug can be the reason
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EIO", "ENAMETOOLONG", "ENOSPC", "ENOTDIR", "EPERM", "EROFS", "ESTALE")
    if hasattr(errno, name)
}


class UserError(ValueError):
    """Names the file or key, the value, and the remedy."""


class Stopped(BaseException):
    """A signal ended a run in order. No Exception: nobody who catches those may take it for the fault of a file."""


def short_repr(value: object) -> str:
    """repr, of bounded length and depth: what is wrong with a value may be its size."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} of thousands of digits"


def int_from_env(name: str, default: int | None = None, least: int = 0, most: int = 10**6) -> int:
    """The whole number that an environment variable holds; UserError: it is none, or not set and has no default."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,7}", text) or not least <= int(text) <= most:
        raise UserError(
            f"the environment variable {name}={short_repr(text)} must be a whole number of {least}..{most}; "
            "correct it, or unset it where no launcher set it"
        )
    return int(text)


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) and return its exit code: 0 done, 2 the user can mend it, 75 stopped, 141 unread."""
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return STOPPED
        except (UserError, OSError) as error:
            if (words := user_error_message(error)) is None:
                raise
            print(words, file=sys.stderr)
            return 2
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, not when the interpreter ends, which would complain
    except BrokenPipeError:  # of what is printed, as in `| head`, or of a pipe between processes, which is a bug
        if not any(is_closed(stream) for stream in (sys.stdout, sys.stderr) if stream is not None):
            raise
        return BROKEN_PIPE
    return 0


def user_error_message(error: BaseException) -> str | None:
    """The line that tells an error which a user can mend; None: it is a bug."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in USER_ERRNOS and error.filename:
        return f"error: {error.filename}: {error.strerror}; mend that, or choose another place"
    return None


def is_closed(stream: TextIO) -> bool:
    """Whether nobody reads it any more; what is still to be printed then goes nowhere."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def reason_of(error: BaseException) -> str:
    """What torch or another library says is wrong with a file, in one line and without its advice to programmers."""
    text = " ".join(str(error).split())
    if code := re.search(r"GLOBAL ([\w.]+)", text):  # of torch.load with weights_only
        return f"it holds {code[1]}, and nothing but tensors and plain values is loaded"
    return re.split(r"\. (?=[A-Z(])", text)[0][:160] or type(error).__name__
