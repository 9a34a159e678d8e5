"""The parts of the loop: schedule, optimizer groups, checkpoints, logs."""

import json
import math

import pytest
import torch
from torch import nn

from allspark.config import ModelConfig, OptimConfig
from allspark.engine.checkpoint import load_checkpoint, load_state, save_checkpoint
from allspark.engine.log import RunLog, drop_lines_after
from allspark.engine.optim import build_optimizer, poly_lr, set_lr
from allspark.errors import UserError
from allspark.models.memory import SemanticMemory
from allspark.models.segmentor import build_model


def test_poly_schedule():
    cfg = OptimConfig(lr=0.1, power=0.9)
    assert poly_lr(cfg, 0, 10) == 0.1
    assert math.isclose(poly_lr(cfg, 5, 10), 0.1 * 0.5**0.9)
    late = OptimConfig(lr=0.1, power=0.9, late=True)  # the released code sets the rate behind the step
    assert [poly_lr(late, step, 10) for step in range(4)] == [0.1] + [poly_lr(cfg, step, 10) for step in range(3)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_two_parameter_groups(name):
    model = build_model(ModelConfig(encoder="mit_b0"), 3, 64)
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1, lr_multi=10.0, weight_decay=0.02), model)
    set_lr(optimizer, 0.01)
    encoder, others = optimizer.param_groups
    assert (encoder["lr"], others["lr"]) == (0.01, 0.1)
    assert {id(p) for p in encoder["params"]} == {id(p) for p in model.encoder.parameters()}
    assert len(encoder["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert encoder["weight_decay"] == others["weight_decay"] == 0.02


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(path, {"model": nn.Linear(2, 2).state_dict(), "step": 3, "recipe": {"a": [1, None, "x"]}})
    content = load_checkpoint(path, needed=("model", "step", "recipe"))
    assert (content["step"], content["recipe"]) == (3, {"a": [1, None, "x"]})
    assert [p.name for p in tmp_path.iterdir()] == ["latest.pth"]  # no temporary file stays


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": (x for x in ())})  # a generator cannot be saved: the write dies half way
    assert load_checkpoint(path, needed=("step",))["step"] == 1


def test_state_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"here\.pth.*weight: \(3, 2\) in the file, \(4, 2\) in the model"):
        load_state(nn.Linear(2, 4), nn.Linear(2, 3).state_dict(), "here.pth")


def test_a_memory_that_was_saved_without_its_count_counts_as_full():
    memory = SemanticMemory(2, 4, side=3)
    state = {name: value for name, value in memory.state_dict().items() if name != "filled"}
    load_state(memory, state, "here.pth")
    assert memory.filled.tolist() == [4, 4]
    with pytest.raises(UserError, match="1 tensors differ, first pointer: absent in the file"):
        load_state(memory, {"queue": memory.queue}, "here.pth")


def test_log_lines_and_means(tmp_path):
    log = RunLog(tmp_path, active=True, interval=2, start_step=0, total_steps=4)
    for step, value in enumerate((1.0, 3.0, 5.0), start=1):
        log.add({"loss": torch.tensor(value)}, step=step, epoch=0, lr=0.1, images=4)
    log.scores(step=3, epoch=0, miou=50.0, iou={"a": 50.0, "b": None})
    log.info("hello")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss"), line.get("miou")) for line in lines] == [(2, 2.0, None), (3, None, 50.0)]
    assert lines[0]["images_per_s"] > 0 and lines[1]["iou"] == {"a": 50.0, "b": None}
    assert "hello" in (tmp_path / "train.log").read_text()
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_resumed_log_has_no_doubles(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')  # a dying run wrote half a line
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("active", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, active):
    log = RunLog(tmp_path, active=active, interval=1, start_step=0, total_steps=4)
    with pytest.raises(UserError, match="step 7: the loss is nan"):
        log.add({"loss": torch.tensor(float("nan"))}, step=7, epoch=0, lr=0.1, images=4)
