"""What a run tells: metrics.jsonl, train.log, TensorBoard events and the terminal. Only process 0 writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from allspark.errors import UserError

METRICS = "metrics.jsonl"


class RunLog:
    """Losses are kept as tensors and become numbers every `interval` steps: one host sync then, none in between."""

    def __init__(self, folder: Path, *, active: bool, interval: int, start_step: int, total_steps: int) -> None:
        self.active, self.interval = active, interval
        self.kept: list[dict[str, Tensor]] = []
        self.images, self.since = 0, time.perf_counter()
        if not active:
            return
        self.metrics = folder / METRICS
        self.text = folder / "train.log"
        drop_lines_after(self.metrics, start_step)
        self.writer = SummaryWriter(folder, purge_step=start_step + 1)
        self.bar = tqdm(total=total_steps, initial=start_step, disable=None, unit="step", dynamic_ncols=True)

    def info(self, message: str) -> None:
        """A line for people, to the terminal and train.log."""
        if self.active:
            tqdm.write(message)
            with open(self.text, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(' ', 'seconds')}  {message}\n")

    def add(self, losses: Mapping[str, Tensor], *, step: int, epoch: int, lr: float, images: int) -> None:
        """After optimizer step number `step` (from 1). A loss that is not finite ends the run, on every process."""
        self.kept.append({name: value.detach() for name, value in losses.items()})
        self.images += images
        if self.active:
            self.bar.update()
        self.last = step, epoch, lr
        if len(self.kept) >= self.interval:
            self.flush()

    def flush(self) -> None:
        """Log what was kept; at the end of an epoch too, so that a resumed run averages over the same steps."""
        if not self.kept:
            return
        step, epoch, lr = self.last
        values = mean_values(self.kept)
        seconds = time.perf_counter() - self.since
        speed = self.images / seconds
        self.kept, self.images, self.since = [], 0, time.perf_counter()
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"step {step}: the loss is {values['loss']}; nothing was saved since the last epoch. "
                f"Lower optim.lr (now {lr:.2e}) and start over with --fresh"
            )
        if self.active:
            self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            line = {"step": step, "epoch": epoch, "lr": lr, **values, "images_per_s": round(speed, 2)}
            self._write(line, step, {f"train/{name}": value for name, value in line.items()})

    def scores(
        self, *, step: int, epoch: int, miou: float, iou: Mapping[str, float | None], **others: float | None
    ) -> None:
        """An evaluation: mIoU, IoU per class and others in percent; None is what has no value, as a class not there."""
        if self.active:
            line = {"step": step, "epoch": epoch, "miou": miou, **others, "iou": dict(iou)}
            scalars = {f"eval/{name}": value for name, value in {"miou": miou, **others}.items()}
            scalars |= {f"eval_iou/{name}": value for name, value in iou.items()}
            self._write(line, step, {name: value for name, value in scalars.items() if value is not None})
        self.since = time.perf_counter()  # the time of an evaluation is not training time

    def _write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.writer.close()


def mean_values(kept: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each loss over the steps that had it, in one transfer from the device."""
    names = list(dict.fromkeys(name for losses in kept for name in losses))
    means = [torch.stack([losses[name].float() for losses in kept if name in losses]).mean() for name in names]
    return dict(zip(names, torch.stack(means).tolist(), strict=True))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a dying run wrote by half is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run will do again."""
    if path.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")
