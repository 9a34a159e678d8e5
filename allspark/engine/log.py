"""What a run tells: metrics.jsonl, train.log, TensorBoard events and the terminal. Only process 0 writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from allspark.engine.stepper import Stepper, mean_losses
from allspark.utils.atomic import durable_write_text, writing
from allspark.utils.errors import Stopped, UserError

METRICS = "metrics.jsonl"


class RunLog:
    """Losses are kept as tensors and become numbers every `interval` steps: one host sync then, none in between.

    start: where the run goes on; lines behind it are forgotten, its steps are done again. stepper: who counts the steps
    that were skipped; in_row: how many were the last ones, as of the last line.
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
    ) -> None:
        self.active, self.interval, self.stepper = active, interval, stepper
        self.kept: list[dict[str, Tensor]] = []
        self.last, self.last_loss = (start_step, start_epoch, math.nan), math.nan
        self.skipped, self.in_row = (0, 0) if stepper is None else (int(stepper.skipped), 0)
        self.images, self.since = 0, time.perf_counter()
        if not active:
            return
        self.metrics = folder / METRICS
        self.text = folder / "train.log"
        with writing(self.metrics):
            drop_lines_after(self.metrics, start_step, start_epoch)
            end_line(self.text)
            self.writer = SummaryWriter(folder, purge_step=start_step + 1)
        self.hook, threading.excepthook = threading.excepthook, quiet_thread
        self.bar = tqdm(total=total_steps, initial=start_step, disable=None, unit="step", dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_) -> None:
        """What ended the run, if it did not come to its end, is its last line."""
        if self.active and isinstance(error, UserError | Stopped):
            with contextlib.suppress(OSError):
                self._append(self.text, stamped(str(error)))
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.close()

    def info(self, message: str) -> None:
        """A line for people, to the terminal and train.log."""
        if self.active:
            with writing(self.text):
                tqdm.write(message)
                self._append(self.text, stamped(message))

    def add(self, losses: Mapping[str, Tensor], *, step: int, epoch: int, lr: float, images: int) -> None:
        """After optimizer step number `step` (from 1)."""
        self.kept.append({name: value.detach() for name, value in losses.items()})
        self.images += images
        if self.active:
            self.bar.update()
        self.last = step, epoch, lr
        if len(self.kept) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Log what was kept: every `interval` steps of an epoch, and at its end."""
        if not self.kept:
            return
        step, epoch, lr = self.last
        values, count = mean_values(self.kept), len(self.kept)
        self.last_loss = self.kept[-1]["loss"].item()
        speed = self.images / (time.perf_counter() - self.since)
        self.kept, self.images, self.since = [], 0, time.perf_counter()
        before = self.skipped
        if self.stepper is not None:
            self.skipped, self.in_row = torch.stack((self.stepper.skipped, self.stepper.in_row)).tolist()
        if new := self.skipped - before:
            self.info(
                f"WARNING: step {step}: {new} of the last {count} steps had no finite gradient and were skipped "
                f"({self.skipped} so far, the last {self.in_row} in a row)"
            )
        if self.active:
            counted = {"skipped": self.skipped} if self.skipped else {}
            line = {"step": step, "epoch": epoch, "lr": lr, **values, **counted, "images_per_s": round(speed, 2)}
            self.bar.set_postfix(loss=values["loss"] and f"{values['loss']:.3f}", refresh=False)
            self._write(line, step, {f"train/{name}": value for name, value in line.items() if value is not None})

    def scores(
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
        """An evaluation: mIoU, IoU per class and others in percent; None is what has no value, as a class not there.

        memory: how much of each class's slots is written, in percent. pictures: (H, W, 3) uint8, for TensorBoard alone.
        """
        if self.active:
            line = {"step": step, "epoch": epoch, "miou": miou, **others, "iou": dict(iou)}
            scalars = {f"eval/{name}": value for name, value in {"miou": miou, **others}.items()}
            scalars |= {f"eval_iou/{name}": value for name, value in iou.items()}
            if memory is not None:
                line["memory"] = dict(memory)
                scalars |= {f"memory/{name}": value for name, value in memory.items()}
            with writing(self.metrics):
                for name, picture in (pictures or {}).items():
                    self.writer.add_image(name, picture, step, dataformats="HWC")
            self._write(line, step, {name: value for name, value in scalars.items() if value is not None})
        self.since = time.perf_counter()  # the time of an evaluation is not training time

    def _write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        with writing(self.metrics):
            self._append(self.metrics, json.dumps(line) + "\n")
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def _append(self, path: Path, text: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)

    def sync(self) -> None:
        """All that was logged, on the disk."""
        if self.active:
            with writing(self.metrics):
                self.writer.flush()
                with open(self.metrics, "a", encoding="utf-8") as file:
                    os.fsync(file.fileno())

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The losses that are kept and not logged yet."""
        return [{name: value.cpu() for name, value in losses.items()} for losses in self.kept]

    def load_state_dict(self, kept: list[dict[str, Tensor]], device: torch.device) -> None:
        self.kept = [{name: value.to(device) for name, value in losses.items()} for losses in kept]

    def close(self) -> None:
        if self.active:
            self.active = False
            self.bar.close()
            try:
                with writing(self.metrics):
                    self.writer.close()
            finally:
                threading.excepthook = self.hook


def stamped(message: str) -> str:
    return f"{datetime.now().isoformat(' ', 'seconds')}  {message}\n"


def quiet_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread tells a full disk to the next who writes as well, which is enough; no traceback."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def mean_values(kept: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """mean_losses of the steps as numbers, in one transfer; None: no step had one."""
    means = mean_losses(kept)
    numbers = torch.stack(list(means.values())).tolist()
    return {name: number if math.isfinite(number) else None for name, number in zip(means, numbers, strict=True)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a dying run wrote by half is left out."""
    lines = []
    for text in text_of(path).splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: holds other bytes than text; take it away, which loses curves and no weights"
        ) from None


def drop_lines_after(path: Path, step: int, epoch: int = 0) -> None:
    """Forget the lines of steps behind `step`, and of evaluations of `epoch` on: a resumed run will do them again."""
    if not path.is_file():
        return
    lines = read_metrics(path)
    kept = [line for line in lines if line["step"] <= step and not ("miou" in line and line["epoch"] >= epoch)]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text != text_of(path):
        durable_write_text(path, text)


def end_line(path: Path) -> None:
    """A line that a dying run wrote by half stays so, and does not run into the next one."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
