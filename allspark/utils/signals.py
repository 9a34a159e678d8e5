"""The signals that stop a run, before and after it has anything to save. Imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from types import FrameType

from allspark.utils.errors import STOPPED

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
    SIGNALS.append(signal.SIGHUP)  # the terminal was closed


def exit_on_signals() -> None:
    """Call first in a command that trains: a signal ends it with exit code 75, also while modules are imported.

    `engine.stop.Stop` takes over for the run, and ignores signals after it, when the exit code is decided.
    """
    for number in SIGNALS:
        signal.signal(number, exit_stopped)


def exit_stopped(number: int, frame: FrameType | None) -> None:
    """Signal handler. It exits at once: an exception could be lost in the middle of an import."""
    os.write(2, f"\n{stop_message(number)}\n".encode())
    os._exit(STOPPED)


def stop_message(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}, nothing to save; run the same command again to continue"
