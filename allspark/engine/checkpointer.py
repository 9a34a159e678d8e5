"""What keeps a run's work: when a checkpoint is written, when the run stops for a signal, or for numbers gone bad."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from allspark import distributed
from allspark.engine.checkpoint import BEST, LATEST, PREVIOUS, Position, save_checkpoint
from allspark.engine.log import RunLog
from allspark.engine.signals import SAVE, Stop, name_of
from allspark.utils.errors import Stopped, UserError

DIVERGED = "stopped.pth"  # the state of a run that was stopped because of its numbers, to look into


class Keeper:
    """Saves every `interval` steps and `minutes` minutes (0: not), at the ends of epochs, and when a signal asks.

    content(position): a checkpoint, made by all processes together. images(position): those of the step before it.
    max_skipped: so many steps in a row without a finite gradient end the run.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        log: RunLog,
        stop: Stop,
        content: Callable[[Position], Mapping[str, Any]],
        images: Callable[[Position], Sequence[str]],
        *,
        interval: int,
        minutes: float,
        max_skipped: int,
    ) -> None:
        self.folder, self.model, self.log, self.stop = folder, model, log, stop
        self.device = next(model.parameters()).device
        self.content, self.images = content, images
        self.interval, self.seconds, self.max_skipped = interval, 60 * minutes, max_skipped
        self.saved_at = time.monotonic()

    def after_step(self, reached: Position) -> None:
        """Save if it is time, stop if somebody asks; all processes at the same step."""
        if self.log.in_row >= self.max_skipped:
            self.give_up(reached)
        overdue = bool(self.seconds) and time.monotonic() - self.saved_at >= self.seconds
        wish = self.stop.poll(self.device, save=overdue and distributed.is_main())
        if wish or (self.interval and reached.step % self.interval == 0):
            self.save(reached)
        if wish > SAVE:
            self.leave(wish, reached)

    def after_epoch(self, reached: Position, improved: bool = False, last: bool = False) -> None:
        """Save, as best.pth too if it is; stop if somebody asks and there is more to come."""
        self.save(reached, improved)
        trim_heap()
        if last:
            distributed.barrier()  # a launcher may end those that still write soon after the first is gone
        elif (wish := self.stop.agree(self.device)) > SAVE:
            self.leave(wish, reached)

    def save(self, reached: Position, improved: bool = False) -> None:
        if self.log.in_row >= self.max_skipped:
            self.give_up(reached)
        if not distributed.all_finite(self.model):
            raise UserError(
                f"step {reached.step}: a weight is not a number; nothing of it was saved. Lower optim.lr and start "
                f"over with --fresh"
            )
        content = self.content(reached)
        if distributed.is_main():
            self.log.sync()  # what is logged up to here is on the disk before the checkpoint that counts on it
            if improved:  # before latest.pth: a run killed in between evaluates once more, and finds its best again
                save_checkpoint(self.folder / BEST, content)
            save_checkpoint(self.folder / LATEST, content, previous=self.folder / PREVIOUS)
        self.saved_at = time.monotonic()
        self.stop.pending.clear()

    def leave(self, wish: int, reached: Position) -> None:
        distributed.barrier()  # nobody goes, and takes the others with it, before process 0 has written
        name = name_of(wish - 1)
        raise Stopped(f"stopped by {name} behind step {reached.step}, saved; start the same command again to go on")

    def give_up(self, reached: Position) -> None:
        """Too many steps in a row without a finite gradient: the same answer on all processes, since it is reduced."""
        names = list(self.images(reached))
        content = self.content(reached)
        if distributed.is_main():
            save_checkpoint(self.folder / DIVERGED, {**content, "images": names})
        distributed.barrier()
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise UserError(
            f"step {reached.step}: the last {self.log.in_row} steps had no finite gradient and were skipped (last "
            f"loss {self.log.last_loss}, lr {self.log.last[2]:.2e}); the last step's images: {shown}. The state is in "
            f"{self.folder / DIVERGED}, {LATEST} is as it was. Look at these images, or lower optim.lr and start over "
            f"with --fresh"
        )


def trim_heap() -> None:
    """Free pages back to the system, where malloc is glibc's. scripts/setup.sh has them kept from step to step; those
    of evaluations and checkpoints, of other sizes, would leave holes, and the holes add up over hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
