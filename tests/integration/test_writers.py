"""The optional metric writers: logged values, resumed runs, missing packages."""

import contextlib
import json
import sys

import numpy as np
import pytest
import torch

from allspark.engine import writers
from allspark.engine.log import RunLog
from allspark.engine.writers import RUN_IDS, scalars
from allspark.utils.errors import Stopped, UserError

STEP = {"step": 2, "epoch": 0, "lr": 0.1, "loss": 2.0, "loss_u": None, "images_per_s": 3.5}
EVALUATION = {"step": 2, "epoch": 0, "miou": 50.0, "pseudo_accuracy": None, "iou": {"a": 50.0, "b": None}}


def log_run(folder, writer, start_step=0):
    """Two steps, an evaluation and an image, from `start_step` on."""
    options = {"interval": 1, "start_step": start_step, "total_steps": 4, "writers": [writer], "config": {"seed": 1}}
    with RunLog(folder, active=True, **options) as log:
        for step in (start_step + 1, start_step + 2):
            log.add({"loss": torch.tensor(float(step))}, step=step, epoch=0, lr=0.1, images=4)
        pictures = {"val/a b": np.zeros((4, 6, 3), np.uint8)}
        log.evaluation(step=step, epoch=0, miou=50.0, iou={"a (x)": 25.0, "b": None}, pictures=pictures)
    return json.loads((folder / RUN_IDS).read_text())[writer] if (folder / RUN_IDS).exists() else None


def test_scalar_names():
    assert scalars(STEP) == {"train/lr": 0.1, "train/loss": 2.0, "train/images_per_s": 3.5}
    assert scalars(EVALUATION) == {"eval/miou": 50.0, "eval_iou/a": 50.0}
    assert scalars({**EVALUATION, "memory": {"a": 10.0}})["memory/a"] == 10.0


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_missing_package(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"log\.writers: {name} is not installed; pip install {package}"):
        log_run(tmp_path, name)


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = log_run(tmp_path, "wandb")
    assert log_run(tmp_path, "wandb", start_step=2) == first  # a resumed run continues
    assert log_run(tmp_path, "wandb") != first  # a run that starts over is another one
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert sum(first in name for name in runs) == 2 and len(runs) == 3
    assert list((tmp_path / "wandb").rglob("*.png"))


def test_mlflow_file_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    first = log_run(folder, "mlflow")
    assert log_run(folder, "mlflow", start_step=2) == first
    client = mlflow.MlflowClient()
    assert [entry.value for entry in client.get_metric_history(first, "train/loss")] == [1.0, 2.0, 3.0, 4.0]
    run = client.get_run(first)
    assert (run.data.metrics["eval_iou/a _x_"], run.info.status, run.info.run_name) == (25.0, "FINISHED", "run")
    assert log_run(folder, "mlflow") != first


def test_failing_service_is_not_fatal(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://like/that")
    with pytest.raises(UserError, match=r"log\.writers: mlflow failed .*remove it from log\.writers"):
        log_run(tmp_path, "mlflow")


class BrokenWriter:
    """A tracking service that fails after start-up."""

    def __init__(self, folder, start_step, config):
        self.calls = []

    def metrics(self, line):
        raise ConnectionError("service unavailable")

    images = sync = close = metrics


def test_a_service_that_fails_later_is_disabled_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(writers.WRITERS, "wandb", BrokenWriter)
    log_run(tmp_path, "wandb")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (line,) = (line for line in (tmp_path / "train.log").read_text().splitlines() if "WARNING" in line)
    assert "log.writers: wandb failed (service unavailable)" in line


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (Stopped("stopped"), "stopped"), (UserError("wrong"), "failed"), (RuntimeError(), "failed")],
)
def test_writers_receive_how_the_run_ended(tmp_path, monkeypatch, error, status):
    class Recorder(BrokenWriter):
        def close(self, status):
            ended.append(status)

    ended = []
    monkeypatch.setitem(writers.WRITERS, "wandb", Recorder)
    options = {"interval": 1, "start_step": 0, "total_steps": 4, "writers": ["wandb"]}
    with contextlib.suppress(Stopped, UserError, RuntimeError), RunLog(tmp_path, active=True, **options):
        if error is not None:
            raise error
    assert ended == [status]


def test_a_failed_run_is_not_finished_in_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for error, status in ((Stopped("stopped"), "KILLED"), (UserError("wrong"), "FAILED")):
        options = {"interval": 1, "start_step": 0, "total_steps": 4, "writers": ["mlflow"]}
        with pytest.raises(type(error)), RunLog(tmp_path, active=True, **options):
            raise error
        number = json.loads((tmp_path / RUN_IDS).read_text())["mlflow"]
        assert mlflow.MlflowClient().get_run(number).info.status == status
