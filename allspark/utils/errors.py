"""Errors that the user can fix: one message and exit code 2. Everything else is a bug: traceback and exit code 1."""

from __future__ import annotations

import errno
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

# Exit codes: output pipe closed by its reader (as SIGPIPE); stopped by a signal, saved, start again to resume
# (EX_TEMPFAIL); ended by Ctrl-C, in training by a second one
BROKEN_PIPE, STOPPED, INTERRUPTED = 141, 75, 130

USER_ERRNOS = {  # file system errors that are never caused by a bug
    getattr(errno, name)
    for name in (
        "EACCES",
        "EDQUOT",
        "EIO",
        "ENAMETOOLONG",
        "ENOSPC",
        "ENOTDIR",
        "EPERM",
        "EROFS",
        "ESTALE",
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
}


class UserError(ValueError):
    """An error the user can fix; the message names the file or key, the value, and the remedy."""


class Stopped(BaseException):
    """A signal ended the run in order. Not an Exception, so that no handler mistakes it for a bad file."""


def short_repr(value: object) -> str:
    """repr of bounded length and depth, for values that may be wrong because they are huge."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a {type(value).__name__} of thousands of digits"


def abbreviate(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and the number of the others."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def int_from_env(name: str, default: int | None = None, least: int = 0, most: int = 10**6) -> int:
    """Integer value of an environment variable; UserError if it is invalid, or unset without a default."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not re.fullmatch(r"[0-9]{1,7}", text) or not least <= int(text) <= most:
        raise UserError(
            f"environment variable {name}={short_repr(text)} must be an integer in {least}..{most}; "
            "correct it, or unset it if no launcher set it"
        )
    return int(text)


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) -> exit code: 0 done, 2 user error, else see above."""
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return STOPPED
        except KeyboardInterrupt:
            print("\ninterrupted by Ctrl-C", file=sys.stderr)
            return INTERRUPTED
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            if (message := user_error_message(error)) is None:
                raise
            print(message, file=sys.stderr)
            return 2
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # now; at interpreter exit a closed pipe would print a traceback
    except BrokenPipeError:  # our output, as in `| head`; or a pipe between processes, which is a bug
        if not any(is_closed(stream) for stream in (sys.stdout, sys.stderr) if stream is not None):
            raise
        return BROKEN_PIPE
    return 0


def user_error_message(error: BaseException) -> str | None:
    """The message for an error the user can fix; None if it is a bug."""
    if isinstance(error, UserError):
        return printable(f"error: {error}")
    if is_out_of_memory(error):
        return (
            f"error: out of memory ({reason_of(error)}); for training, use micro_batch=1, model.checkpointing=true, "
            "precision=bf16, cuda_graph=false or a smaller data.crop_size (`allspark check` predicts the memory); for "
            "eval and predict, use --mode sliding_window or a smaller --batch-size"
        )
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error):
        return (  # of the networks here, timm's ViTs: they resize their position embedding
            f"error: deterministic=true: {str(error).split()[0]} has no deterministic implementation on this device; "
            "set deterministic=false; if it is the encoder's, another one also helps (dinov2_* in place of timm's ViTs)"
        )
    if isinstance(error, OSError) and error.errno in USER_ERRNOS and error.filename:
        return printable(f"error: {error.filename}: {error.strerror}; fix it or choose another path")
    return None


def printable(text: str) -> str:
    """The text with control characters escaped, because file names and servers' messages may command a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate memory. By name and text: importing torch here would slow every command down."""
    texts = ("CUDA out of memory", "can't allocate memory", "ALLOC_FAILED", "not enough memory")
    texts += ("CUDA error: out of memory", "failure 'out of memory'")  # of the driver, of NCCL
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts))
    )


def is_closed(stream: TextIO) -> bool:
    """Whether the stream's reader is gone; if so, redirect further output to nowhere."""
    try:
        print(file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def reason_of(error: BaseException) -> str:
    """Shorten a library's error message to its first sentence."""
    text = " ".join(str(error).split())
    if code := re.search(r"GLOBAL ([\w.]+)", text):  # torch.load with weights_only
        return f"it contains {code[1]}, but only tensors and plain values are loaded"
    return re.split(r"\. (?=[A-Z(])", text)[0][:160] or type(error).__name__
