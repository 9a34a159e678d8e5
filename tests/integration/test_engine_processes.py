"""Kills while saving, signals, and checkpoints of several processes."""

import os
import signal
import time

import pytest
import torch
from torch import nn

from allspark import distributed
from allspark.engine.checkpoint import (
    buffers_by_rank,
    find_checkpoint,
    load_buffers_of_rank,
    load_checkpoint,
    save_checkpoint,
)
from allspark.engine.signals import Stop


@pytest.mark.parametrize("name", ["link", "replace"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_kill_during_save_leaves_valid_files(saved, monkeypatch, name, count, after):
    """The process ends right before or after the count-th call of os.link or os.replace; then latest.pth is damaged."""
    content, call, calls = load_checkpoint(saved / "latest.pth"), getattr(os, name), []

    def last(*args):
        calls.append(args)
        if after:
            call(*args)
        if len(calls) == count:
            os._exit(9)
        if not after:
            call(*args)

    if not (child := os.fork()):
        monkeypatch.setattr(os, name, last)
        save_checkpoint(saved / "latest.pth", {**content, "step": 3}, previous=saved / "previous.pth")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in ((9,) if name == "replace" or count == 1 else (0,))
    assert find_checkpoint(saved)[1]["step"] in (2, 3)
    with open(saved / "latest.pth", "r+b") as file:
        file.truncate(1000)
    assert find_checkpoint(saved)[0].name == "previous.pth"
    save_checkpoint(saved / "latest.pth", {**content, "step": 4}, previous=saved / "previous.pth")
    assert load_checkpoint(saved / "latest.pth")["step"] == 4
    assert not list(saved.glob("*.link"))


@pytest.mark.parametrize(("pause", "status"), [(0.0, 0), (1.1, 130)])
def test_second_interrupt_exits(pause, status):
    child = os.fork()
    if child == 0:
        with Stop() as stop:
            stop.defer()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0), (signal.SIGUSR1, 0)]
)
def test_worker_with_inherited_handlers(number, status):
    with Stop():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def requests(delay):
    """Process 1 alone is asked to stop, behind its third step."""
    stop, cpu = Stop(), torch.device("cpu")
    found = []
    for step in range(6):
        if step == 2 and distributed.rank() == 1:
            stop.signal = int(signal.SIGTERM)
        found.append(stop.poll(cpu, save=False, delay=delay))
    return found, stop.sync(cpu), len(stop.pending)


def test_ranks_agree_on_stop_step(pair):
    term = 1 + signal.SIGTERM
    assert pair(requests, 0) == [([0, 0, term, term, term, term], term, 0)] * 2
    assert pair(requests, 2) == [([0, 0, 0, 0, term, term], term, 0)] * 2


def ranks_of_buffers():
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(distributed.rank())
    ranks = buffers_by_rank({"model": model}, ())
    shared = buffers_by_rank({"model": model}, ("model.running",))
    model.running_mean.fill_(7.0)
    load_buffers_of_rank({"model": model}, ranks)
    return ranks, shared, model.running_mean


def test_buffers_by_rank(pair):
    for rank, (ranks, shared, mean) in enumerate(pair(ranks_of_buffers)):
        assert list(ranks) == ["model.running_mean"] and ranks["model.running_mean"].tolist() == [[0, 0], [1, 1]]
        assert shared == {} and mean.tolist() == [rank, rank]
