"""When checkpoints are written, and when a run stops because of a signal or of diverging numbers."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from allspark import distributed
from allspark.config import Recipe
from allspark.engine.checkpoint import BEST, LATEST, PREVIOUS, Position, save_checkpoint
from allspark.engine.log import RunLog
from allspark.engine.signals import SAVE, Stop, signal_name
from allspark.engine.stepper import Stepper
from allspark.utils.errors import Stopped, UserError

DIVERGED = "stopped.pth"  # the state of a run that diverged, for inspection


class Checkpointer:
    """Saves every `checkpoint_interval` steps and `checkpoint_minutes` minutes, at the ends of epochs, and on signals.

    Args:
        folder: of the run.
        recipe: its checkpoint_interval and checkpoint_minutes (0 disables either) and optim.max_skipped, the number of
            consecutive skipped steps after which the run stops.
        model: a model that is not finite is not saved.
        stepper: counts skipped steps.
        log: flushed to the disk before each checkpoint.
        stop: receives signals.
        content: position -> content of a checkpoint; a collective call.
        images: maps a position to the image names of the preceding step.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        model: nn.Module,
        stepper: Stepper,
        log: RunLog,
        stop: Stop,
        *,
        content: Callable[[Position], Mapping[str, Any]],
        images: Callable[[Position], Sequence[str]],
    ) -> None:
        self.folder, self.model, self.stepper, self.log, self.stop = folder, model, stepper, log, stop
        self.content, self.images = content, images
        self.interval, self.seconds = recipe.checkpoint_interval, 60 * recipe.checkpoint_minutes
        self.max_skipped = recipe.optim.max_skipped
        self.saved_at = time.monotonic()

    def after_step(self, position: Position) -> None:
        """Save if it is time, and stop if requested; all processes at the same step."""
        if self.stepper.poll_skipped() >= self.max_skipped:
            self.abort_diverged(position)
        overdue = bool(self.seconds) and time.monotonic() - self.saved_at >= self.seconds
        request = self.stop.poll(self.stepper.device, save=overdue and distributed.is_main())
        if request or (self.interval and position.step % self.interval == 0):
            self.save(position)
        if request > SAVE:
            self.leave(request, position)

    def after_epoch(self, position: Position, improved: bool = False, last: bool = False) -> None:
        """Save, and stop if requested.

        Args:
            position: where a resumed run continues.
            improved: save best.pth, too.
            last: the run is finished.
        """
        if last and 2 * int(self.stepper.skipped) > position.step:  # the score is of weights that were hardly trained
            self.abort_diverged(position)
        self.save(position, improved)
        trim_heap()
        if last:
            distributed.barrier()  # the launcher may kill processes that still write when the first one exits
        elif (request := self.stop.sync(self.stepper.device)) > SAVE:
            self.leave(request, position)

    def save(self, position: Position, improved: bool = False) -> None:
        if int(self.stepper.consecutive_skipped) >= self.max_skipped:
            self.abort_diverged(position)
        if not distributed.all_finite(self.model):
            raise UserError(
                f"step {position.step}: a weight is not finite, so nothing was saved. Lower optim.lr and start over "
                f"with --fresh"
            )
        content = self.content(position)
        if distributed.is_main():
            self.log.sync()  # before the checkpoint, which relies on the log up to here
            if improved:  # before latest.pth: a run that is killed in between evaluates again and finds its best again
                save_checkpoint(self.folder / BEST, content)
            save_checkpoint(self.folder / LATEST, content, previous=self.folder / PREVIOUS)
        self.saved_at = time.monotonic()
        self.stop.pending.clear()

    def leave(self, request: int, position: Position) -> None:
        distributed.barrier()  # wait until rank 0 has written; an earlier exit would make the launcher kill it
        name = signal_name(request - 1)
        raise Stopped(f"stopped by {name} after step {position.step}, saved; run the same command again to continue")

    def abort_diverged(self, position: Position) -> None:
        """Raise UserError after too many skipped steps; gradients are reduced, so all processes agree."""
        names, skipped = list(self.images(position)), int(self.stepper.skipped)
        consecutive = int(self.stepper.consecutive_skipped)
        steps = f"the last {consecutive}" if consecutive >= self.max_skipped else f"{skipped} of {position.step}"
        content = self.content(position)
        self.log.flush()
        if distributed.is_main():
            save_checkpoint(self.folder / DIVERGED, {**content, "images": names})
        distributed.barrier()
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise UserError(
            f"step {position.step}: {steps} steps had non-finite gradients and were skipped (last loss "
            f"{float(self.log.last_loss)}, lr {self.log.last_lr:.2e}); images of the last step: {listed}. The state "
            f"was saved to {self.folder / DIVERGED}, {LATEST} is unchanged. Look at these images, or lower optim.lr "
            f"and start over with --fresh"
        )


def trim_heap() -> None:
    """Return free pages to the system, where malloc is glibc's.

    scripts/setup.sh makes malloc keep pages from step to step; without trimming, those of evaluations and checkpoints,
    which have other sizes, would fragment the heap over hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
