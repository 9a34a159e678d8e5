"""What a user can mend, told in one message and exit code 2. Everything else is a bug: traceback, exit code 1."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

NOBODY_READS = 141  # the exit code of a program that SIGPIPE ended


class UserError(ValueError):
    """Names the file or key, the value, and the remedy."""


def run_main(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) and return its exit code: 0 done, 2 the user can mend it, 141 nobody reads on."""
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, not when the interpreter ends, which would complain
    except BrokenPipeError:  # of what is printed, as in `| head`, or of a pipe between processes, which is a bug
        if not any(is_closed(stream) for stream in (sys.stdout, sys.stderr) if stream is not None):
            raise
        return NOBODY_READS
    return 0


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
