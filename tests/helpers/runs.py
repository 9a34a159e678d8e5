"""Checks of a run's folder, and ways to interrupt a run."""

import json
import math
import os

import torch

FILES = {"config.yaml", "run.json", "latest.pth", "previous.pth", "best.pth", "metrics.jsonl", "train.log", ".lock"}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_finite_losses(steps):
    assert steps
    for line in steps:
        losses = {name: value for name, value in line.items() if name.startswith("loss")}
        assert losses and all(map(math.isfinite, losses.values())), line


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"


def without_speed(run):
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_s"} for line in lines]


class At:
    """Replaces a function and calls it; calls `action` before call number `number`."""

    def __init__(self, function, number, action):
        self.function, self.left, self.action = function, number, action

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.function(*args, **options)


def sending(number):
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(run, other):
    straight, again = (load(folder / "latest.pth") for folder in (other, run))
    assert_same_tensors(straight["model"], again["model"])
    assert_same_tensors(straight["method"], again["method"])
    assert (straight["epoch"], straight["step"], straight["best"]) == (again["epoch"], again["step"], again["best"])
    assert without_speed(run) == without_speed(other)
