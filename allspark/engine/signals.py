"""Signals that end a run in order, and how several processes agree on the step that is the last."""

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
from allspark.utils.errors import INTERRUPTED, Stopped

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
FORWARDED = 1.0  # seconds in which a second SIGINT is the first one, sent on by a launcher
LATER = 2  # steps after which a wish is read on a GPU: it has arrived by then, nobody waits for the device
NOTHING, SAVE = 0, 1  # wishes; a larger one is 1 + the number of the signal that ends the run


class Stop:
    """Asked to stop by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (slurm, before the time is up), a run stops at once where
    all is saved, at its start and while it evaluates; where not it is `deferring`: the step is finished and saved.

    A second Ctrl-C ends the process without anything else, exit code 130.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferring = False
        self.first_interrupt: float | None = None
        self.process = os.getpid()
        self.pending: deque[Callable[[], int]] = deque()
        self.before: dict[int, object] = {}
        self.lost = False  # whether what a signal raised was dropped

    def __enter__(self) -> Stop:
        self.hook, sys.unraisablehook = sys.unraisablehook, self.dropped
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        sys.unraisablehook = self.hook
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def dropped(self, what: sys.UnraisableHookArgs) -> None:
        """Raised where Python drops exceptions, as while it forks or frees an object: again, a moment later."""
        if not isinstance(what.exc_value, Stopped):
            return self.hook(what)
        self.lost = True
        threading.Timer(0.1, again, (self.process, self.signal)).start()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return in_worker(number)
        now = time.monotonic()
        if number == signal.SIGINT:
            self.first_interrupt = self.first_interrupt or now
            if now - self.first_interrupt > FORWARDED:
                os.write(2, b"\nstopped at once by a second Ctrl-C; the last checkpoint is as it was\n")
                os._exit(INTERRUPTED)
        if self.signal and not self.lost:
            return
        self.signal, self.lost = number, False
        if not self.deferring:
            raise Stopped(f"stopped by {name_of(number)}, nothing to save; start the same command again to go on")
        if number == signal.SIGINT and distributed.is_main():
            os.write(2, b"\nCtrl-C: this step is finished and saved; once more stops at once\n")

    def defer(self) -> None:
        """From here on there is something to save."""
        self.deferring = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here all is saved."""
        self.deferring = False
        try:
            if self.signal:
                raise Stopped(f"stopped by {name_of(self.signal)}; start the same command again to go on")
            yield
        finally:
            self.deferring = True

    def wish(self, save: bool) -> int:
        return 1 + self.signal if self.signal else SAVE if save else NOTHING

    def poll(self, device: torch.device, save: bool, later: int | None = None) -> int:
        """After each step: the greatest wish of all processes, the same answer on all. save: this one wants to save.

        On a GPU the answer is that of `later` steps ago.
        """
        if distributed.world_size() == 1:
            return self.wish(save)
        self.pending.append(post(self.wish(save), device))
        if len(self.pending) <= (later if later is not None else LATER if device.type == "cuda" else 0):
            return NOTHING
        return self.pending.popleft()()

    def agree(self, device: torch.device) -> int:
        """The greatest wish of all processes now; what was under way is forgotten, on all of them."""
        self.pending.clear()
        return post(self.wish(False), device)() if distributed.world_size() > 1 else self.wish(False)


def again(process: int, number: int) -> None:
    if os.name == "nt":  # os.kill ends a process there, whatever the number
        signal.raise_signal(number)
    else:
        os.kill(process, number)


def in_worker(number: int) -> None:
    """A loader's worker inherits the handlers: it goes when its parent ends it, whose affair all else is."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def post(wish: int, device: torch.device) -> Callable[[], int]:
    """Start to ask all processes; calling what is returned waits for the greatest of their wishes."""
    greatest = distributed.all_reduce_max(torch.full((), wish, device=device))
    if device.type != "cuda":
        return lambda: int(greatest)
    host = torch.empty((), dtype=greatest.dtype, pin_memory=True)
    host.copy_(greatest, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(host)

    return read


def name_of(number: int) -> str:
    return signal.Signals(number).name
