"""Kills while saving, signals, and checkpoints of several processes."""

import contextlib
import os
import signal
import sys
import time

import pytest
import torch
from torch import nn

from allspark import distributed, launch
from allspark.engine.checkpoint import (
    buffers_by_rank,
    find_checkpoint,
    load_buffers_of_rank,
    load_checkpoint,
    save_checkpoint,
)
from allspark.engine.stop import Stop
from allspark.utils.errors import Stopped
from allspark.utils.signals import SIGNALS, exit_on_signals
from helpers.ranks import free_port


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


def test_signals_after_a_run_are_ignored():
    """Until the process has ended: its exit code is decided."""
    child = os.fork()
    if child == 0:
        exit_on_signals()
        with contextlib.suppress(Stopped), Stop():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        os._exit(75)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
def test_waiting_for_other_ranks(variable, number, monkeypatch):
    """A process started alone that a variable of a launcher tells otherwise."""
    rank = "SLURM_PROCID" if variable.startswith("SLURM") else "RANK"
    for name, value in {variable: "3", rank: "0", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "JOIN_NOTICE", 0.05)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writable, 2)
        sys.stderr = os.fdopen(2, "w")  # in place of pytest's
        with Stop():
            launch.init("cpu")
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as errors:
        line = errors.readline()
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
        assert "Traceback" not in errors.read()
    assert line.startswith(f"rank 0 of 3 waits for 2 other process(es); {variable}=3 sets the number of processes")
    assert f"env -u {variable} python" in line


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
