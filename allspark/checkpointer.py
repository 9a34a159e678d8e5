"""What a checkpoint of a run holds, when it is written, how it is resumed, and when a run stops."""

from __future__ import annotations

import contextlib
import ctypes
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from allspark import distributed, launch
from allspark.build import complete
from allspark.config_io import build_recipe, differences, to_plain
from allspark.data.loaders import TrainLoader
from allspark.engine.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    TO_RESUME,
    broadcast_choice,
    buffers_by_rank,
    explain_mismatch,
    find_checkpoint,
    load_buffers_of_rank,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from allspark.engine.log import RunLog
from allspark.engine.position import Position
from allspark.engine.stop import SAVE, Stop, signal_name
from allspark.train_step import TrainState
from allspark.utils.errors import Stopped, UserError, abbreviate

DIVERGED = "diverged.pth"  # the state of a run that diverged, for inspection


class Checkpointer:
    """Saves every `checkpoint_interval` steps and `checkpoint_minutes` minutes, at the ends of epochs, and on signals.

    Args:
        folder: of the run.
        state: what is saved. Its recipe has checkpoint_interval and checkpoint_minutes (0 disables either) and
            optim.max_skipped, the number of consecutive skipped steps after which the run stops.
        loader: of the training batches.
        log: flushed to the disk before each checkpoint.
        stop: receives signals.
    """

    def __init__(self, folder: Path, state: TrainState, loader: TrainLoader, log: RunLog, stop: Stop) -> None:
        self.folder, self.state, self.loader, self.log, self.stop = folder, state, loader, log, stop
        recipe = state.recipe
        self.interval, self.seconds = recipe.checkpoint_interval, 60 * recipe.checkpoint_minutes
        self.max_skipped = recipe.optim.max_skipped
        self.saved_at = time.monotonic()

    def after_step(self, position: Position) -> None:
        """Save if it is time, and stop if requested; all processes at the same step."""
        if self.state.stepper.poll_skipped() >= self.max_skipped:
            self.abort_diverged(position)
        overdue = bool(self.seconds) and time.monotonic() - self.saved_at >= self.seconds
        request = self.stop.poll(self.state.stepper.device, save=overdue and distributed.is_main())
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
        if last and 2 * int(self.state.stepper.skipped) > position.step:  # its score is that of hardly trained weights
            self.abort_diverged(position)
        self.save(position, improved)
        trim_heap()
        if last:
            distributed.barrier()  # the launcher may kill processes that still write when the first one exits
        elif (request := self.stop.sync(self.state.stepper.device)) > SAVE:
            self.leave(request, position)

    def save(self, position: Position, improved: bool = False) -> None:
        if int(self.state.stepper.consecutive_skipped) >= self.max_skipped:
            self.abort_diverged(position)
        if not distributed.all_finite(self.state.model):
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

    def content(self, position: Position) -> dict[str, Any]:
        """The content of a checkpoint; a collective call, because some buffers differ between processes."""
        state, model, method = self.state, self.state.model, self.state.method
        shared = () if state.recipe.model.bottleneck.memory_policy == "local" else ("model.bottleneck.memory.",)
        return {
            "model": model.state_dict(),
            "method": method.state_dict(),
            "ranks": buffers_by_rank({"model": model, "method": method}, shared),
            **state.stepper.state_dict(),
            "log": self.log.state_dict(),
            "epoch": position.epoch,
            "step": position.step,
            "best": position.best,
            "recipe": to_plain(state.recipe),
            "split": self.loader.pairs.lists.split,
            "world_size": distributed.world_size(),
        }

    def leave(self, request: int, position: Position) -> None:
        distributed.barrier()  # wait until rank 0 has written; an earlier exit would make the launcher kill it
        name = signal_name(request - 1)
        raise Stopped(f"stopped by {name} after step {position.step}, saved; run the same command again to continue")

    def abort_diverged(self, position: Position) -> None:
        """Raise UserError after too many skipped steps; gradients are reduced, so all processes agree."""
        names = self.loader.images((position.step - 1) % self.loader.steps_per_epoch)
        skipped = int(self.state.stepper.skipped)
        consecutive = int(self.state.stepper.consecutive_skipped)
        steps = f"the last {consecutive}" if consecutive >= self.max_skipped else f"{skipped} of {position.step}"
        content = self.content(position)
        self.log.flush()
        if distributed.is_main():
            save_checkpoint(self.folder / DIVERGED, {**content, "images": names})
        distributed.barrier()
        raise UserError(
            f"step {position.step}: {steps} steps had non-finite gradients and were skipped (last loss "
            f"{float(self.log.last_loss)}, lr {self.log.last_lr:.2e}); images of the last step: "
            f"{abbreviate(names, 6)}. The state was saved to {self.folder / DIVERGED}, {LATEST} is unchanged. Look at "
            f"these images, or lower optim.lr and start over with --fresh"
        )


def resume(
    save_path: Path, state: TrainState, loader: TrainLoader
) -> tuple[Position, list[dict[str, Tensor]], list[str]]:
    """Load the newest readable checkpoint of save_path into model, method and stepper.

    Args:
        save_path: folder of the run.
        state: what is trained, at its start.
        loader: of the training batches.

    Returns:
        Its position (the start, if there is no checkpoint), losses that were not logged yet, and notes for the log.

    Raises:
        UserError: the checkpoint belongs to another recipe or other file lists, or its position is impossible.
    """
    recipe, model, method, stepper = state.recipe, state.model, state.method, state.stepper
    lists, steps_per_epoch = loader.pairs.lists, loader.steps_per_epoch
    found = find_checkpoint(save_path) if distributed.is_main() else None
    name = broadcast_choice(found and found[0].name, stepper.device)
    if name is None:
        return Position(), [], []
    path = save_path / name
    content, notes = found[1:] if found else (load_checkpoint(path, TO_RESUME), [])
    launch.check_ranks_agree(checkpoint=f"{content['epoch']} {content['step']}")  # a file server may return an old file
    saved_recipe = complete(build_recipe(content["recipe"], None, str(path)))  # adds keys that are newer than the run
    if changed := differences(to_plain(saved_recipe), to_plain(recipe)):
        listed = "; ".join(f"{key}: {old} -> {new}" for key, old, new in changed[:5])
        raise UserError(
            f"{save_path}: contains a run with another recipe ({listed}); choose another --save-path, "
            f"or use --fresh to move the old run aside"
        )
    if changed := differences(to_plain(saved_recipe), to_plain(recipe), runtime=True):
        notes.append(
            "changed since the last start: " + "; ".join(f"{key}: {old} -> {new}" for key, old, new in changed)
        )
    if content["split"]["sha256"] != lists.hash:
        raise UserError(
            f"{path}: this run was started with other images in its lists (split {content['split']['name']}); restore "
            f"them, or use --fresh to move the old run aside"
        )
    epoch, step = content["epoch"], content["step"]
    if epoch > recipe.epochs or not 0 <= step - epoch * steps_per_epoch <= steps_per_epoch * (epoch < recipe.epochs):
        raise UserError(
            f"{path}: step {step} in epoch {epoch} is impossible with {recipe.epochs} epochs of {steps_per_epoch} "
            f"steps; remove the file to resume from another one, or use --fresh to move the run aside"
        )
    load_state(model, content["model"], path)
    load_state(method, content["method"], path)
    with explain_mismatch(path):
        load_buffers_of_rank({"model": model, "method": method}, content.get("ranks", {}))
        stepper.load_state_dict(content)
    if name != LATEST and distributed.is_main() and (save_path / LATEST).exists():
        (save_path / LATEST).rename(save_path / "damaged.pth")  # or the next save moves it over previous.pth
    position = Position(epoch, step, content["best"], content.get("world_size"))
    return position, content.get("log", []), notes


def trim_heap() -> None:
    """Return free pages to the system, where malloc is glibc's.

    scripts/setup.sh makes malloc keep pages from step to step; without trimming, those of evaluations and checkpoints,
    which have other sizes, would fragment the heap over hours.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
