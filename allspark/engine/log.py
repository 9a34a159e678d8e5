"""The log of a run, on rank 0: losses and evaluations to the writers, messages to train.log and the terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from allspark.engine.stepper import Stepper, mean_losses
from allspark.engine.writers import METRICS, Status, open_writers
from allspark.utils.atomic import wrap_write_errors
from allspark.utils.errors import Stopped, UserError, printable

TEXT = "train.log"
MINUTE = 60.0  # seconds between progress lines where there is no progress bar
STOPS = (Stopped, KeyboardInterrupt)  # end a run that can be resumed without a change
T = TypeVar("T")


class RunLog:
    """Losses stay on the device; every `interval` steps their means are logged, with one host sync.

    Rank 0 logs its own losses, which are not averaged over the ranks.

    Args:
        folder: of the run.
        active: whether this process writes: True on rank 0.
        interval: steps between log lines.
        start_step, start_epoch: position from which the run continues; what was logged after it is discarded.
        total_steps: of the whole run, for the progress.
        stepper: counts the skipped steps.
        writers: where metrics go in addition to metrics.jsonl (log.writers).
        config: the recipe as plain values, for the writers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        interval: int,
        start_step: int,
        total_steps: int,
        start_epoch: int = 0,
        stepper: Stepper | None = None,
        writers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.active, self.interval, self.stepper = active, interval, stepper
        self.pending: list[dict[str, Tensor]] = []  # losses of the steps since the last line
        self.last_step, self.last_epoch, self.last_lr = start_step, start_epoch, math.nan
        self.last_loss = torch.tensor(math.nan)  # on the device of the losses
        self.skipped, self.consecutive_skipped = (0, 0) if stepper is None else (int(stepper.skipped), 0)
        self.images, self.since = 0, time.perf_counter()
        if not active:
            return
        self.path, self.text = folder / METRICS, folder / TEXT
        with wrap_write_errors(self.path):
            end_line(self.text)
            self.writers = open_writers(writers, folder, start_step, start_epoch, config, self.info)
        self.total_steps, self.started_at, self.reported_at = total_steps, (start_step, self.since), -math.inf
        self.miou = math.nan  # of the last evaluation
        self.bar = tqdm(total=total_steps, initial=start_step, disable=None, unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_) -> None:
        """An error that ends the run is the last line of train.log."""
        if self.active and isinstance(error, UserError | Stopped):
            with contextlib.suppress(OSError):
                self._append(str(error))
        status: Status = "finished" if error is None else "stopped" if isinstance(error, STOPS) else "failed"
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.close(status)

    def info(self, message: str) -> None:
        """Write a message to the terminal and train.log."""
        if self.active:
            message = printable(message)
            with wrap_write_errors(self.text):
                tqdm.write(message)
                self._append(message)

    def exclude_startup(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the wait for the first one (workers, cache) is not counted as training time."""
        for batch in batches:
            if self.active and math.isnan(self.last_lr):  # no step yet
                self.since = time.perf_counter()
                self.started_at = (self.started_at[0], self.since)
            yield batch

    def add(self, losses: Mapping[str, Tensor], *, step: int, epoch: int, lr: float, images: int) -> None:
        """Record a step.

        Args:
            losses: scalar tensors by name.
            step: steps done, from 1.
            epoch: of the step.
            lr: learning rate of the step.
            images: labeled images of the step, over all processes.
        """
        self.pending.append({name: value.detach() for name, value in losses.items()})
        self.images += images
        if self.active:
            self.bar.update()
        self.last_step, self.last_epoch, self.last_lr = step, epoch, lr
        self.last_loss = self.pending[-1]["loss"]
        if len(self.pending) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Log the means of the pending losses: every `interval` steps, and at the end of an epoch."""
        pending, self.pending = self.pending, []
        if not pending or not self.active:
            return
        counters = [] if self.stepper is None else [self.stepper.skipped, self.stepper.consecutive_skipped]
        means = mean_losses(pending)
        numbers = torch.stack([*means.values(), *(counter.float() for counter in counters)]).tolist()  # one transfer
        values = {
            name: number if math.isfinite(number) else None
            for name, number in zip(means, numbers[: len(means)], strict=True)
        }
        speed = self.images / (time.perf_counter() - self.since)
        self.images, self.since = 0, time.perf_counter()
        before = self.skipped
        if counters:
            self.skipped, self.consecutive_skipped = map(int, numbers[len(means) :])
        if new := self.skipped - before:
            self.info(
                f"WARNING: step {self.last_step}: {new} of the last {len(pending)} steps had a non-finite gradient and "
                f"were skipped ({self.skipped} in total, the last {self.consecutive_skipped} consecutively)"
            )
        line = {"step": self.last_step, "epoch": self.last_epoch, "lr": self.last_lr, **values}
        line |= {"skipped": self.skipped} if self.skipped else {}
        self._write({**line, "images_per_s": round(speed, 2)})
        self.show_progress(values, speed)

    def show_progress(self, losses: Mapping[str, float | None], speed: float) -> None:
        """On a terminal beside the progress bar, elsewhere as a line a minute."""
        shown = {name: f"{losses[name]:.3f}" for name in ("loss", "loss_u") if losses.get(name) is not None}
        shown = {"epoch": self.last_epoch + 1, **shown, "lr": f"{self.last_lr:.2e}"}
        shown |= {} if math.isnan(self.miou) else {"mIoU": f"{self.miou:.2f}"}
        self.bar.set_postfix(shown, refresh=False)
        now, (first, started) = time.perf_counter(), self.started_at
        if self.bar.disable and now - self.reported_at >= MINUTE:
            self.reported_at = now
            left = (now - started) / max(self.last_step - first, 1) * (self.total_steps - self.last_step)
            numbers = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.info(
                f"step {self.last_step}/{self.total_steps}, {numbers}, {speed:.1f} images/s, "
                f"{tqdm.format_interval(left)} left"
            )

    def evaluation(
        self,
        *,
        step: int,
        epoch: int,
        miou: float,
        iou: Mapping[str, float | None],
        memory: Mapping[str, float] | None = None,
        pictures: Mapping[str, np.ndarray] | None = None,
        **others: float | None,
    ) -> None:
        """Record an evaluation.

        Args:
            step: steps done.
            epoch: the epoch that was just finished.
            miou: in percent.
            iou: class name -> IoU in percent; None for a class that does not occur.
            memory: class name -> written share of its memory slots, in percent.
            pictures: name -> (H, W, 3) uint8, for writers that show images.
            others: more numbers, such as the quality of the pseudo-labels; None if there is no value.
        """
        if self.active:
            self.miou = miou
            line = {"step": step, "epoch": epoch, "miou": miou, **others, "iou": dict(iou)}
            line |= {} if memory is None else {"memory": dict(memory)}
            self._write(line, pictures)
        self.since = time.perf_counter()  # images_per_s does not include evaluations

    def sync(self) -> None:
        """Flush everything that was logged to the disk."""
        if self.active:
            with wrap_write_errors(self.path):
                for writer in self.writers:
                    writer.sync()

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The pending losses."""
        return [{name: value.cpu() for name, value in losses.items()} for losses in self.pending]

    def load_state_dict(self, pending: list[dict[str, Tensor]], device: torch.device) -> None:
        self.pending = [{name: value.to(device) for name, value in losses.items()} for losses in pending]

    def close(self, status: Status = "finished") -> None:
        if not self.active:
            return
        self.bar.close()
        try:
            with contextlib.ExitStack() as stack:  # every writer is closed even if another one raises
                stack.enter_context(wrap_write_errors(self.path))
                for writer in self.writers:
                    stack.callback(writer.close, status)
        finally:
            self.active = False

    def _write(self, line: Mapping[str, Any], images: Mapping[str, np.ndarray] | None = None) -> None:
        with wrap_write_errors(self.path):
            for writer in self.writers:
                if images:
                    writer.images(images, line["step"])
                writer.metrics(line)

    def _append(self, message: str) -> None:
        with open(self.text, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {message}\n")


def end_line(path: Path) -> None:
    """Complete the last line of a text file, if a killed run left it without a line end."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
