"""The EMA teacher against a literal loop, and its use by the method allspark."""

import copy

import pytest
import torch
from torch import nn

from allspark.methods import Progress
from allspark.methods.ema import EMATeacher
from allspark.models.student import Student, predict
from allspark.utils.errors import UserError
from helpers.networks import FIRST, make_method, make_model, random_batches


def test_update_equals_loop():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    teacher = EMATeacher(copy.deepcopy(student), 0.9)
    expected = {name: value.clone() for name, value in student.state_dict().items()}
    for step in range(15):  # 1 - 1 / (step + 1) passes 0.9 at step 9
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        student(torch.randn(2, 3, 4, 4))
        teacher.update(student, step)
        keep = min(1 - 1 / (step + 1), 0.9)
        for name, value in student.state_dict().items():
            if name.endswith("num_batches_tracked"):
                expected[name] = value.clone()
            else:
                expected[name] = keep * expected[name] + (1 - keep) * value
    for name, value in teacher.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_never_trains():
    teacher = EMATeacher(nn.BatchNorm2d(2), 0.9)
    teacher.train()
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_teacher_labels_and_predicts():
    model, method = make_model(dropout=0.0, drop_path=0.0), make_method("allspark", teacher="ema")
    method.attach(model)
    assert not any("memory" in name for name in method.state_dict())  # no second memory: inference never reads one
    labeled, unlabeled = random_batches(method)
    with torch.no_grad():  # a student that has gone elsewhere; labels must still be the teacher's
        model.decoder.classifier.bias[0] += 1e3
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    method.losses(Student(model), labeled, unlabeled, FIRST)
    expected = predict(method.teacher.model, unlabeled.weak, share_keys=True).logits
    torch.testing.assert_close(seen[-1].pseudo_logits, expected)
    assert method.predictor(model) is method.teacher.model

    method.after_step(Student(model), Progress(step=1, epoch=0, total_steps=10))  # keeps half
    bias = method.teacher.model.decoder.classifier.bias
    torch.testing.assert_close(bias[0], model.decoder.classifier.bias[0] - 500)


def test_teacher_state_round_trip():
    model, method = make_model(), make_method("allspark", teacher="ema")
    method.attach(model)
    with torch.no_grad():
        method.teacher.model.decoder.classifier.bias.fill_(3.0)
    other = make_method("allspark", teacher="ema")
    other.attach(make_model())
    other.load_state_dict(method.state_dict(), strict=True)
    assert other.teacher.model.decoder.classifier.bias.eq(3).all()


def test_momentum_below_one():
    with pytest.raises(UserError, match=r"teacher_momentum=1.0"):
        make_method("allspark", teacher="ema", teacher_momentum=1.0)
