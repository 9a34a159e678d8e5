"""A run of train.py equals its parts, called one by one in a literal loop."""

import math

import pytest
import torch

import train
from allspark.arguments import parse
from allspark.build import build_loader, build_method
from allspark.data.datasets import spec_for
from allspark.data.splits import resolve
from allspark.engine.optim import build_optimizer
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.sliding_window import inference_for
from allspark.methods import Progress
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.recipe_arguments import recipe_of
from allspark.train_step import seed_step
from helpers.runs import assert_same_tensors, load

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_run_equals_its_parts_in_a_loop(place, read_metrics):
    """Weights, EMA teacher, learning rates, order of the images, seeds, and which network is evaluated."""
    words = ["method.teacher=ema", "method.teacher_momentum=0.5", "seed=3", "model.encoder=tiny", "log.interval=1"]
    words = place.train(*words, "log.writers=[]", "data.horizontal_flip=false", "data.vertical_flip=true")
    train.main(words)
    recipe = recipe_of(parse("train", words))
    spec, lists = spec_for(recipe.data), resolve(recipe.data)
    torch.manual_seed(3)
    model = build_model(recipe.model, 3, 65).train()
    method = build_method(recipe, spec)
    method.attach(model)
    optimizer, loader = build_optimizer(recipe.optim, model), build_loader(recipe, lists, spec, method.views)
    step, rates = 0, []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for labeled, unlabeled in loader.on(CPU):
            rates.append(1e-3 * (1 - step / 6) ** recipe.optim.power)
            for group in optimizer.param_groups:
                group["lr"] = rates[-1] * group["scale"]
            seed_step(3, step)
            progress = Progress(step, epoch, 6)
            losses = method.losses(Student(model, read_memory=epoch >= 1), labeled, unlabeled, progress)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(Student(model), progress)
            step += 1
    saved = load(place.run / "latest.pth")
    assert_same_tensors(model.state_dict(), saved["model"])
    assert_same_tensors(method.state_dict(), saved["method"])
    steps, evaluations = read_metrics(place.run)
    assert [line["lr"] for line in steps] == pytest.approx(rates)
    val, inference = SegmentationDataset(lists.val, spec), inference_for(spec, 65)
    teacher, student = (evaluate(each, val, spec, CPU, inference).miou for each in (method.predictor(model), model))
    assert evaluations[-1]["miou"] == pytest.approx(teacher, abs=1e-3) and abs(teacher - student) > 0.01


def test_skipped_first_step_after_resume(place, monkeypatch):
    """It leaves the saved batch norm statistics and memory as they are, not those of the random initialization."""
    words, step = place.train("checkpoint_interval=1"), train.train_step

    def train_until(last, poisoned=None):
        def call(run, labeled, unlabeled, position, lr):
            if position.step == last:
                raise KeyboardInterrupt
            if position.step == poisoned:
                labeled.image[0, 0, 0, 0] = math.nan
            return step(run, labeled, unlabeled, position, lr)

        monkeypatch.setattr(train, "train_step", call)
        with pytest.raises(KeyboardInterrupt):
            train.main(words)
        return load(place.run / "latest.pth")["model"]

    before = train_until(2)
    assert_same_tensors(train_until(3, poisoned=2), before)
