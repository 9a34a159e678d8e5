"""The methods of docs/tools by which results take a method apart."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from allspark.config import ModelConfig
from allspark.losses import CrossEntropy
from allspark.methods.fixmatch import FixMatch
from allspark.methods.supervised import Supervised
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from helpers.networks import CLASSES, CROP, FIRST, random_batches

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs" / "tools"))
from flattened import Flattened
from norm_statistics import FixMatchFrozen, FixMatchUnused, SupervisedFrozen
from supervised_ema import SupervisedEMA


def trained(kind):
    """Losses and model after one backward pass in training mode, and the statistics of its encoder before."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder="timm:resnet18"), CLASSES, CROP).train()
    method = kind(CrossEntropy())
    method.attach(model)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items() if "running" in name}
    losses = method.losses(Student(model), *random_batches(method), FIRST)
    losses["loss"].backward()
    return losses, model, before


@pytest.mark.parametrize("kind", [FixMatchFrozen, SupervisedFrozen])
def test_frozen_statistics(kind):
    _, model, before = trained(kind)
    after = model.encoder.state_dict()
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())
    norms = [module for module in model.encoder.modules() if isinstance(module, _BatchNorm)]
    assert all(norm.weight.grad is not None for norm in norms)
    assert model.decoder.fuse.bn.training and model.decoder.fuse.bn.num_batches_tracked > 0


def test_unused_unlabeled_images():
    """They change the statistics, and no gradient beyond that."""
    unused, model, before = trained(FixMatchUnused)
    fixmatch, _, _ = trained(FixMatch)
    assert unused["loss"] == unused["loss_x"] == fixmatch["loss_x"] != fixmatch["loss"]
    assert all(not torch.equal(value, model.encoder.state_dict()[name]) for name, value in before.items())


def test_supervised_training_with_a_teacher():
    """The same losses; what is evaluated follows the network without being trained."""
    torch.manual_seed(0)
    model, method = (
        build_model(ModelConfig(encoder="timm:resnet18"), CLASSES, CROP).train(),
        SupervisedEMA(CrossEntropy()),
    )
    method.attach(model)
    batch = random_batches(method)
    assert method.losses(Student(model), *batch, FIRST)["loss"] == trained(Supervised)[0]["loss"]
    teacher, weight = method.predictor(model), model.decoder.classifier.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    method.after_step(Student(model), replace(FIRST, step=1000))
    torch.testing.assert_close(teacher.decoder.classifier.weight, before + 0.01)
    assert not teacher.training and not teacher.decoder.classifier.weight.requires_grad


def test_flattened_map():
    _, model, _ = trained(Flattened)
    deepest = model.encoder(torch.randn(2, 3, CROP, CROP))[-1]
    assert torch.equal(deepest, deepest[..., :1, :1].expand_as(deepest)) and deepest.std() > 0
