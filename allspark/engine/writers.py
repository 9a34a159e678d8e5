"""Where the metrics and images of a run go: always metrics.jsonl, and the writers that `log.writers` names."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from allspark.utils.atomic import durable_write_text
from allspark.utils.errors import UserError, reason_of, short_repr

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
RUN_IDS = "writers.json"  # writer -> id of its run, so that a resumed run continues there
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # module -> what pip installs
PROJECT = "allspark"
Status = Literal["finished", "stopped", "failed"]  # how a run ended


class Writer:
    """A destination of metrics and images. Methods that a subclass leaves out do nothing."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: the means of some training steps or, if it has "miou", an evaluation."""

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Images (H, W, 3) uint8 by name."""

    def sync(self) -> None:
        """Flush everything to the disk; called before a checkpoint is saved."""

    def close(self, status: Status) -> None:
        """Called once, at the end."""


def open_writers(
    names: Sequence[str],
    folder: Path,
    start_step: int,
    start_epoch: int,
    config: Mapping[str, Any] | None,
    warn: Callable[[str], None],
) -> list[Writer]:
    """The writer of metrics.jsonl and those named.

    Args:
        names: keys of WRITERS.
        folder: of the run.
        start_step, start_epoch: position from which the run continues; what was logged after it is discarded.
        config: the recipe as plain values.
        warn: called with a message if a tracking service fails later.

    Raises:
        UserError: a package is not installed, or a service cannot be used at start-up.
    """
    writers: list[Writer] = [JsonLines(folder, start_step, start_epoch)]
    with contextlib.ExitStack() as stack:  # closes those that were opened if another one cannot be
        for name in names:
            writer = WRITERS[name](folder, start_step, config)
            writers.append(ServiceWriter(name, writer, warn) if name in PACKAGES else writer)
            stack.callback(writers[-1].close, "failed")
        stack.pop_all()
    return writers


class JsonLines(Writer):
    """metrics.jsonl, a JSON object per line."""

    def __init__(self, folder: Path, start_step: int, start_epoch: int) -> None:
        self.path = folder / METRICS
        drop_lines_after(self.path, start_step, start_epoch)

    def metrics(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())


class TensorBoard(Writer):
    """Event files in the folder of the run."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=start_step + 1)
        self.excepthook, threading.excepthook = threading.excepthook, ignore_os_errors

    def metrics(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        self.writer.flush()

    def close(self, status: Status) -> None:
        try:
            self.writer.close()
        finally:
            threading.excepthook = self.excepthook


class WandB(Writer):
    """Weights & Biases. Its own environment variables set project, entity and mode (WANDB_MODE=offline)."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any] | None) -> None:
        self.wandb = import_package("wandb")
        with wrap_service_errors("wandb"):
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=saved_id(folder, "wandb", start_step),
                resume="allow",
                dir=folder,
                config=dict(config or {}),
            )
            # W&B's step counter would reject steps repeated after a resume
            self.run.define_metric("*", step_metric="step")
        save_id(folder, "wandb", self.run.id)

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.run.log({**scalars(line), "step": line["step"]})

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self.run.log({**{name: self.wandb.Image(image) for name, image in images.items()}, "step": step})

    def close(self, status: Status) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


class MLflow(Writer):
    """An MLflow server, file store or database: MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say which."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any] | None) -> None:
        mlflow = import_package("mlflow")
        with wrap_service_errors("mlflow"):
            self.metric = importlib.import_module("mlflow.entities").Metric
            self.client, name = mlflow.MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            self.id = saved_id(folder, "mlflow", start_step)
            if self.id is None:
                experiment = self.client.get_experiment_by_name(name)
                number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
                self.id = self.client.create_run(number, run_name=folder.name).info.run_id
                self.client.log_dict(self.id, dict(config or {}), "config.yaml")
            else:
                self.client.update_run(self.id, "RUNNING")
        save_id(folder, "mlflow", self.id)

    def metrics(self, line: Mapping[str, Any]) -> None:
        now, step = int(time.time() * 1000), line["step"]
        named = {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in scalars(line).items()}
        self.client.log_batch(self.id, [self.metric(name, float(value), now, step) for name, value in named.items()])

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        for name, image in images.items():
            self.client.log_image(self.id, image, artifact_file=f"{name}/{step}.png")

    def close(self, status: Status) -> None:
        self.client.set_terminated(self.id, {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[status])


class ServiceWriter(Writer):
    """The writer of a tracking service. Its first error is logged as a warning and disables it; training goes on.

    Args:
        name: name of the service.
        writer: sends to the service; its methods may raise any exception.
        warn: called with the warning.
    """

    def __init__(self, name: str, writer: Writer, warn: Callable[[str], None]) -> None:
        self.name, self.warn = name, warn
        self.writer: Writer | None = writer

    def metrics(self, line: Mapping[str, Any]) -> None:
        self._call("metrics", line)

    def images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self._call("images", images, step)

    def sync(self) -> None:
        self._call("sync")

    def close(self, status: Status) -> None:
        self._call("close", status)

    def _call(self, method: str, *args: Any) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)(*args)
        except Exception as error:
            self.writer = None
            self.warn(
                f"WARNING: log.writers: {self.name} failed ({reason_of(error)}) and receives nothing more from this "
                f"process; {METRICS} is complete"
            )


WRITERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl under names such as train/loss, eval/miou and eval_iou/<class>."""
    kind = "eval" if "miou" in line else "train"
    named = {f"{kind}/{name}": line[name] for name in line if name not in ("step", "epoch", "iou", "memory")}
    named |= {f"eval_iou/{name}": value for name, value in line.get("iou", {}).items()}
    named |= {f"memory/{name}": value for name, value in line.get("memory", {}).items()}
    return {name: value for name, value in named.items() if value is not None}


def import_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"log.writers: {name} is not installed; pip install {PACKAGES[name]}, or remove {name} from log.writers"
        ) from None


@contextlib.contextmanager
def wrap_service_errors(name: str) -> Iterator[None]:
    """Turn any exception of a tracking service at start-up into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"log.writers: {name} failed ({reason_of(error)}); correct its settings or remove it from log.writers"
        ) from error


def run_ids(folder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # damaged: the run starts anew there
        ids = json.loads((folder / RUN_IDS).read_text(encoding="utf-8"))
        return {name: value for name, value in ids.items() if isinstance(value, str)}
    return {}


def saved_id(folder: Path, writer: str, start_step: int) -> str | None:
    """The id under which a resumed run continues; None for a run that starts."""
    return run_ids(folder).get(writer) if start_step else None


def save_id(folder: Path, writer: str, run_id: str) -> None:
    durable_write_text(folder / RUN_IDS, json.dumps({**run_ids(folder), writer: run_id}) + "\n")


def ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    """No traceback from TensorBoard's thread for a full disk: the next write raises the same error."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a killed run left incomplete.

    Raises:
        UserError: the file is not text, or has a line that train.py does not write.
    """
    *texts, last = read_text(path).split("\n")  # the last one has no line end
    lines = [parse_line(text, f"{path}, line {number}") for number, text in enumerate(texts, start=1) if text]
    with contextlib.suppress(UserError):
        lines.append(parse_line(last, str(path)))
    return lines


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; remove it, which loses the curves but no weights") from None


def parse_line(text: str, source: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not is_line(line):
        raise UserError(f"{source}: not a line that train.py writes: {short_repr(text)}; remove the line")
    return line


def is_line(line: Any) -> bool:
    """Whether this is the content of a line of metrics.jsonl."""
    return isinstance(line, dict) and is_count(line.get("step")) and ("miou" not in line or is_evaluation(line))


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # false for NaN


def is_percent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def is_evaluation(line: Mapping[str, Any]) -> bool:
    iou = line.get("iou")
    numbers = isinstance(iou, dict) and all(value is None or is_percent(value) for value in iou.values())
    return numbers and is_percent(line["miou"]) and is_count(line.get("epoch"))


def drop_lines_after(path: Path, step: int, epoch: int = 0) -> None:
    """Remove the lines of steps after `step` and of evaluations from `epoch` on: a resumed run does them again."""
    if not path.is_file():
        return
    lines = read_metrics(path)
    remaining = [line for line in lines if line["step"] <= step and not ("miou" in line and line["epoch"] >= epoch)]
    text = "".join(json.dumps(line) + "\n" for line in remaining)
    if text != read_text(path):
        durable_write_text(path, text)
