"""Schedule, optimizer groups, checkpoints and logs."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from allspark.config import ModelConfig, OptimConfig
from allspark.engine.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from allspark.engine.log import RunLog
from allspark.engine.optim import build_optimizer, poly_lr, set_lr
from allspark.engine.run_lock import RunLock
from allspark.engine.stepper import Stepper
from allspark.engine.stop import SAVE, Stop
from allspark.engine.writers import drop_lines_after
from allspark.models.memory import SemanticMemory
from allspark.models.segmentor import build_model
from allspark.utils.errors import Stopped, UserError, user_error_message
from allspark.utils.retry import retry_transient


def test_poly_schedule():
    cfg = OptimConfig(lr=0.1, power=0.9)
    assert poly_lr(cfg, 0, 10) == 0.1
    assert math.isclose(poly_lr(cfg, 5, 10), 0.1 * 0.5**0.9)
    late = OptimConfig(lr=0.1, power=0.9, lr_one_step_late=True)  # as in the released code
    assert [poly_lr(late, step, 10) for step in range(4)] == [0.1] + [poly_lr(cfg, step, 10) for step in range(3)]


@pytest.mark.parametrize("late", [False, True])
def test_linear_warmup(late):
    """As in SegFormer's recipe: the schedule's rate times a factor that rises from 0 to 1."""
    plain = OptimConfig(lr=0.1, power=1.0, lr_one_step_late=late)
    warm = OptimConfig(lr=0.1, power=1.0, lr_one_step_late=late, warmup_steps=4)
    factors = [poly_lr(warm, step, 10) / poly_lr(plain, step, 10) for step in range(10)]
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    assert factors == pytest.approx([0, *expected[:-1]] if late else expected)


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


def test_failed_write_keeps_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": (x for x in ())})  # a generator cannot be saved: the write dies half way
    assert load_checkpoint(path, needed=("step",))["step"] == 1


def test_mismatched_state(tmp_path):
    with pytest.raises(
        UserError, match=r"here\.pth.*weight: \(3, 2\) float32 in the file, \(4, 2\) float32 in the model"
    ):
        load_state(nn.Linear(2, 4), nn.Linear(2, 3).state_dict(), "here.pth")


def test_memory_without_count_is_full():
    memory = SemanticMemory(2, 4, 3)
    state = {name: value for name, value in memory.state_dict().items() if name != "filled"}
    load_state(memory, state, "here.pth")
    assert memory.filled.tolist() == [4, 4]
    with pytest.raises(UserError, match="1 tensors differ, first pointer: absent in the file"):
        load_state(memory, {"queue": memory.queue}, "here.pth")


def test_log_lines_and_means(tmp_path):
    log = RunLog(tmp_path, active=True, interval=2, start_step=0, total_steps=4)
    for step, value in enumerate((1.0, 3.0, 5.0), start=1):
        log.add({"loss": torch.tensor(value)}, step=step, epoch=0, lr=0.1, images=4)
    log.evaluation(step=3, epoch=0, miou=50.0, iou={"a": 50.0, "b": None})
    log.info("hello")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss"), line.get("miou")) for line in lines] == [(2, 2.0, None), (3, None, 50.0)]
    assert lines[0]["images_per_s"] > 0 and lines[1]["iou"] == {"a": 50.0, "b": None}
    assert "hello" in (tmp_path / "train.log").read_text()
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_resumed_log_has_no_duplicates(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')  # a dying run wrote half a line
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# Losses that are no numbers, and lines that travel in a checkpoint


def test_means_skip_nonfinite(tmp_path):
    log = RunLog(tmp_path, active=True, interval=3, start_step=0, total_steps=6)
    for step, value in enumerate((1.0, math.nan, 3.0, math.inf, math.nan, math.nan), start=1):
        log.add({"loss": torch.tensor(value)}, step=step, epoch=0, lr=0.1, images=4)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.0, None]


def test_skipped_steps_in_log(tmp_path):
    model = nn.Linear(2, 1)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    with RunLog(tmp_path, active=True, interval=4, start_step=0, total_steps=8, stepper=stepper) as log:
        for step, value in enumerate((1.0, math.nan, math.nan, 1.0, 1.0, 1.0, 1.0, math.nan), start=1):
            loss = model(torch.full((1, 2), value)).sum()
            stepper.backward(loss)
            stepper.step()
            log.add({"loss": loss}, step=step, epoch=0, lr=0.1, images=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [2, 3] and log.consecutive_skipped == 1
    warnings = [line for line in (tmp_path / "train.log").read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 2 and "step 4: 2 of the last 4 steps" in warnings[0] and "3 in total" in warnings[1]


def test_a_log_line_takes_one_transfer_and_an_inactive_log_none(tmp_path, monkeypatch):
    model = nn.Linear(2, 1)
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
    reads = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), reads))
    for active in (True, False):
        with RunLog(tmp_path, active=active, interval=2, start_step=0, total_steps=4, stepper=stepper) as log:
            reads.clear()
            for step in (1, 2):
                losses = {"loss": torch.tensor(1.0), "loss_x": torch.tensor(2.0)}
                log.add(losses, step=step, epoch=0, lr=0.1, images=1)
            assert reads == (["tolist"] if active else [])


def counted(read, reads):
    """The method `read` of a tensor, whose name is appended to `reads` at each call."""

    def call(*args):
        reads.append(read.__name__)
        return read(*args)

    return call


def test_pending_losses_survive_resume(tmp_path):
    first = RunLog(tmp_path, active=False, interval=3, start_step=0, total_steps=3)
    for step, value in enumerate((1.0, 2.0), start=1):
        first.add({"loss": torch.tensor(value)}, step=step, epoch=0, lr=0.1, images=4)
    with RunLog(tmp_path, active=True, interval=3, start_step=2, total_steps=3) as second:
        second.load_state_dict(first.state_dict(), torch.device("cpu"))
        second.add({"loss": torch.tensor(6.0)}, step=3, epoch=0, lr=0.1, images=4)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(line)["step"], json.loads(line)["loss"]) == (3, 3.0)


def test_repeated_evaluation_logs_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "epoch": 0, "loss": 1}\n{"step": 3, "epoch": 0, "miou": 1, "iou": {}}\n')
    drop_lines_after(path, 3, epoch=1)
    assert len(path.read_text().splitlines()) == 2
    drop_lines_after(path, 3, epoch=0)
    assert path.read_text() == '{"step": 3, "epoch": 0, "loss": 1}\n'


def test_log_ends_with_reason(tmp_path):
    (tmp_path / "train.log").write_text("half a li")
    with pytest.raises(UserError), RunLog(tmp_path, active=True, interval=1, start_step=0, total_steps=1) as log:
        log.info("hello")
        raise UserError("mend this")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0] == "half a li" and lines[1].endswith("hello") and lines[-1].endswith("mend this")


# Files


@contextlib.contextmanager
def file_size_limit(size):
    """Writing beyond it fails as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_previous_checkpoint_is_saved(saved):
    assert [load_checkpoint(saved / name)["step"] for name in ("latest.pth", "previous.pth")] == [2, 1]
    assert sorted(path.name for path in saved.iterdir()) == ["best.pth", "latest.pth", "previous.pth"]


@pytest.mark.parametrize("size", [0, 1000, 15_000])
def test_full_disk_keeps_both_checkpoints(saved, size):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with (
        file_size_limit(size),
        pytest.raises(UserError, match=r"latest\.pth: cannot be written \(File too large; .*free"),
    ):
        save_checkpoint(saved / "latest.pth", {"model": {"w": torch.zeros(5000)}}, previous=saved / "previous.pth")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_full_disk_while_logging(tmp_path, capfd):
    log = RunLog(tmp_path, active=True, interval=1, start_step=0, total_steps=9)
    with file_size_limit(10), pytest.raises(UserError, match="File too large"), log:
        for step in range(1, 9):
            log.add({"loss": torch.tensor(1.0)}, step=step, epoch=0, lr=0.1, images=4)
            log.sync()
    assert "Traceback" not in capfd.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of the weights: torch itself reads on
    path.write_bytes(content)


def foreign(path):
    torch.save({"state_dict": {}}, path)


@pytest.mark.parametrize("harm", [cut, flip, foreign, Path.unlink])
def test_damaged_checkpoint_falls_back(saved, harm):
    path, content, notes = find_checkpoint(saved)
    assert (path.name, content["step"], notes) == ("latest.pth", 2, [])
    harm(saved / "latest.pth")
    path, content, notes = find_checkpoint(saved)
    assert (path.name, content["step"]) == ("previous.pth", 1)
    assert "resuming from previous.pth (step 1): " in notes[0] and "latest.pth: " in notes[0]
    harm(saved / "previous.pth")
    assert find_checkpoint(saved)[0].name == "best.pth"
    harm(saved / "best.pth")
    if harm is Path.unlink:
        assert find_checkpoint(saved) is None
    else:
        with pytest.raises(UserError, match=r"none of latest\.pth, previous\.pth, best\.pth can be read.*--fresh"):
            find_checkpoint(saved)


def test_unopenable_checkpoint_is_not_damaged(saved):
    """As when a file server is away; here the process may open no further file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(os.devnull, os.O_RDONLY)  # the lowest free number: below it none is left
    os.close(taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files: .*latest.pth"):
            find_checkpoint(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert find_checkpoint(saved)[0].name == "latest.pth"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_transient_read_error_is_retried(saved, monkeypatch, number):
    """At every read of a network file system, also those by torch; an error that stays is no damage either."""
    monkeypatch.setattr(retry_transient, "__defaults__", ((0.0, 0.0),))
    left = [2]

    class Unreliable(io.FileIO):
        def readinto(self, buffer):
            if left[0] and self.tell() > 1000:
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return super().readinto(buffer)

    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedReader(Unreliable(path)))
    assert find_checkpoint(saved)[0].name == "latest.pth" and left == [0]
    left[0] = -1
    with pytest.raises(OSError, match=r"latest\.pth") as caught:
        find_checkpoint(saved)
    assert user_error_message(caught.value).startswith(f"error: {saved / 'latest.pth'}: {os.strerror(number)}")


def test_no_hard_links(saved, monkeypatch):
    def no_links(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", no_links)
    content = load_checkpoint(saved / "latest.pth")
    save_checkpoint(saved / "latest.pth", {**content, "step": 3}, previous=saved / "previous.pth")
    assert [load_checkpoint(saved / name)["step"] for name in ("latest.pth", "previous.pth")] == [3, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("links", [True, False])
def test_both_files_are_as_before_when_a_rename_fails(saved, monkeypatch, links, count):
    """The count-th os.replace fails, with and without hard links."""
    content, names = load_checkpoint(saved / "latest.pth"), ("latest.pth", "previous.pth")
    before, replace, calls = [(saved / name).read_bytes() for name in names], os.replace, []

    def no_links(*args):
        raise OSError(errno.EPERM, "no hard links")

    def failing(*args):
        calls.append(args)
        if len(calls) == count:
            raise OSError(errno.EIO, "broken disk")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    step = functools.partial(save_checkpoint, saved / "latest.pth", previous=saved / "previous.pth")
    if links and count == 3:  # two renames are enough
        return step({**content, "step": 3})
    with pytest.raises(UserError, match="cannot be written"):
        step({**content, "step": 3})
    assert [(saved / name).read_bytes() for name in names] == before
    assert not [*saved.glob("*.link"), *saved.glob("*.tmp")]
    step({**content, "step": 4})
    assert [load_checkpoint(saved / name)["step"] for name in names] == [4, 2]


def test_folder_lock(tmp_path):
    folder = tmp_path / "run"
    with RunLock(folder) as held:
        with pytest.raises(UserError, match="in use by another job.*train.log"), RunLock(folder, timeout=0.1):
            pass
        (folder / "file").touch()
        held.move_aside(tmp_path / "aside")
        assert (tmp_path / "aside" / "file").exists() and folder.is_dir()
        with pytest.raises(UserError, match="in use"), RunLock(folder, timeout=0.1):
            pass
    assert not folder.exists()  # nothing was ever in the new one
    with RunLock(folder, timeout=0.1):
        pass


# Signals


def test_immediate_stop():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"), Stop():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_dropped_signal_exception_is_raised_again(capfd):
    class Freed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the handler runs in here
                pass

    with pytest.raises(Stopped, match="stopped by SIGTERM"), Stop():
        Freed()
        time.sleep(10)
    assert "Traceback" not in capfd.readouterr().err


def test_deferred_signal():
    cpu = torch.device("cpu")
    with Stop() as stop:
        stop.defer()
        assert stop.poll(cpu, save=False) == 0 and stop.poll(cpu, save=True) == SAVE
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll(cpu, save=False) == 1 + signal.SIGUSR1
        with pytest.raises(Stopped, match="stopped by SIGUSR1"), stop.immediately():
            pytest.fail("it was to stop before")
