"""Signals that end a run in an orderly way, and how several processes agree on the last step."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

import torch

from allspark import distributed
from allspark.engine.async_read import DELAY, start_read
from allspark.utils.errors import INTERRUPTED, Stopped
from allspark.utils.signals import SIGNALS, exit_stopped, stop_message

FORWARDED = 1.0  # seconds during which a second SIGINT is the first one, forwarded by a launcher
NOTHING, SAVE = 0, 1  # requests; a larger one is 1 + the number of the signal that ends the run


class Stop:
    """Handles SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (sent by slurm before the time limit) and SIGHUP.

    At start-up and during an evaluation, when everything is saved, a signal stops the run immediately. Otherwise it is
    deferred: the step is finished and saved first. A second Ctrl-C ends the process at once, with exit code 130.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferring = False
        self.first_interrupt: float | None = None
        self.process = os.getpid()
        self.pending: deque[Callable[[], int]] = deque()
        self.previous_handlers: dict[int, object] = {}
        self.lost = False  # whether Python dropped the exception of a signal

    def __enter__(self) -> Stop:
        self.previous_hook, sys.unraisablehook = sys.unraisablehook, self.handle_unraisable
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            self.previous_handlers = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        """Restore the handlers; at the end of a command, whose exit code is now decided, ignore further signals."""
        sys.unraisablehook = self.previous_hook
        for number, handler in self.previous_handlers.items():
            signal.signal(number, signal.SIG_IGN if handler is exit_stopped else handler or signal.SIG_DFL)

    def handle_unraisable(self, what: sys.UnraisableHookArgs) -> None:
        """Send the signal again if Python dropped its exception, as it does in destructors and while forking."""
        if not isinstance(what.exc_value, Stopped):
            return self.previous_hook(what)
        self.lost = True
        threading.Timer(0.1, send_signal, (self.process, self.signal)).start()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return handle_in_worker(number)
        now = time.monotonic()
        if number == signal.SIGINT:
            self.first_interrupt = self.first_interrupt or now
            if now - self.first_interrupt > FORWARDED:
                os.write(2, b"\nstopped immediately by a second Ctrl-C; the last checkpoint is unchanged\n")
                os._exit(INTERRUPTED)
        if self.signal and not self.lost:
            return
        self.signal, self.lost = number, False
        if not self.deferring:
            raise Stopped(stop_message(number))
        if number == signal.SIGINT and distributed.is_main():
            os.write(2, b"\nCtrl-C: finishing and saving this step; press again to stop immediately\n")

    def defer(self) -> None:
        """From now on there is something to save: finish the step first."""
        self.deferring = True

    @contextlib.contextmanager
    def immediately(self) -> Iterator[None]:
        """Context in which everything is saved, so that a signal stops the run immediately."""
        self.deferring = False
        try:
            if self.signal:
                raise Stopped(f"stopped by {signal_name(self.signal)}; run the same command again to continue")
            yield
        finally:
            self.deferring = True

    def request(self, save: bool) -> int:
        """What this process wants: NOTHING, SAVE, or to stop."""
        return 1 + self.signal if self.signal else SAVE if save else NOTHING

    def poll(self, device: torch.device, save: bool, delay: int | None = None) -> int:
        """Call after each step: the maximum of the requests of all processes, the same on all of them.

        Args:
            device: of the collective.
            save: whether this process wants to save.
            delay: steps after which the answer is read; default: 0, on a GPU DELAY, so that the host does not wait.
        """
        if distributed.world_size() == 1:
            return self.request(save)
        self.pending.append(self.start_sync(device, save))
        if len(self.pending) <= (delay if delay is not None else DELAY if device.type == "cuda" else 0):
            return NOTHING
        return self.pending.popleft()()

    def sync(self, device: torch.device) -> int:
        """The maximum of the requests of all processes now; earlier polls are dropped on all of them."""
        self.pending.clear()
        return self.start_sync(device, False)() if distributed.world_size() > 1 else self.request(False)

    def start_sync(self, device: torch.device, save: bool) -> Callable[[], int]:
        """Send this process's request; calling the result waits for the maximum."""
        return start_read(distributed.all_reduce_max(torch.full((), self.request(save), device=device)))


def send_signal(process: int, number: int) -> None:
    if os.name == "nt":  # os.kill terminates the process there, whatever the number
        signal.raise_signal(number)
    else:
        os.kill(process, number)


def handle_in_worker(number: int) -> None:
    """Loader workers inherit the handlers: they end by SIGTERM and leave other signals to their parent."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def signal_name(number: int) -> str:
    return signal.Signals(number).name
