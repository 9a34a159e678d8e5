"""The stepper: skipped steps, clipping, precisions."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from allspark.config import OptimConfig
from allspark.data.batch import split_micro_batches
from allspark.engine.optim import build_optimizer
from allspark.engine.stepper import Stepper, autocast, mean_losses, set_precision, sync_gradients
from allspark.models.cast_weights import cast_weights
from allspark.models.student import Student
from allspark.utils.errors import UserError
from helpers.networks import FIRST, make_method, make_model, random_batches

CPU = torch.device("cpu")
OPTIMS = [OptimConfig(name="sgd", lr=0.1), OptimConfig(name="adamw", lr=0.1)]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).train()


def go(model, stepper, images):
    stepper.backward(model(images).square().mean())
    stepper.step()


def images(seed, value=None):
    batch = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    if value is not None:
        batch[1, 0, 0, 0] = value
    return batch


@pytest.mark.parametrize("cfg", OPTIMS, ids=lambda cfg: cfg.name)
@pytest.mark.parametrize("bad", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_step_changes_nothing(cfg, bad, value):
    """Weights, momenta and batch norm statistics are bit for bit those of a run without that batch."""
    states = []
    for batches in (
        [images(i, value if i == bad else None) for i in range(5)],
        [images(i) for i in range(5) if i != bad],
    ):
        model = small_model()
        stepper = Stepper(model, build_optimizer(cfg, model), "fp32")
        for batch in batches:
            go(model, stepper, batch)
        states.append((model.state_dict(), stepper))
    (with_bad, stepper), (without, quiet) = states
    assert all(torch.equal(with_bad[name], without[name]) for name in without)
    momenta, expected = (s.optimizer.state_dict()["state"] for s in (stepper, quiet))
    for number, state in expected.items():
        assert all(torch.equal(momenta[number][name], value) for name, value in state.items())
    assert (int(stepper.skipped), int(stepper.consecutive_skipped), int(quiet.skipped)) == (1, 0, 0)


def test_skipped_count_round_trip():
    model = small_model()
    stepper = Stepper(model, build_optimizer(OPTIMS[0], model), "fp32")
    for batch in (images(0, float("nan")), images(1), images(2, float("nan")), images(3, float("nan"))):
        go(model, stepper, batch)
    twin = Stepper(model, build_optimizer(OPTIMS[0], model), "fp32")
    twin.load_state_dict(stepper.state_dict())
    assert (int(twin.skipped), int(twin.consecutive_skipped)) == (3, 2)


@pytest.mark.parametrize("cfg", OPTIMS, ids=lambda cfg: cfg.name)
def test_resume_without_fused_kernels(cfg):
    model = small_model()
    elsewhere = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[cfg.name](model.parameters(), lr=0.1, fused=False)
    elsewhere.param_groups[0]["initial_lr"] = 0.1
    here = build_optimizer(cfg, model)
    groups = [
        {**group, "params": own["params"]}
        for group, own in zip(
            [elsewhere.state_dict()["param_groups"][0]] * len(here.param_groups), here.state_dict()["param_groups"]
        )
    ]
    stepper, before = Stepper(model, here), model[0].weight.clone()
    stepper.load_state_dict({"optimizer": {"state": {}, "param_groups": groups}})
    go(model, stepper, images(0))
    assert not torch.equal(model[0].weight, before)


def test_buffer_changes_between_steps_survive():
    model = small_model()
    stepper = Stepper(model, build_optimizer(OPTIMS[0], model), "fp32")
    model[1].running_mean.fill_(5.0)
    stepper.save_buffers()
    go(model, stepper, images(0, float("nan")))
    assert (model[1].running_mean == 5.0).all()


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_sum_to_batch_gradient(size):
    """Where no layer looks at other images: batch norm by its statistics, no dropout."""
    method = make_method("supervised")
    labeled, unlabeled = random_batches(method, 4, 4)
    found = []
    for micro_batch in (size, 4):
        model = make_model("none", dropout=0.0, drop_path=0.0).eval()
        method.attach(model)
        stepper = Stepper(model, build_optimizer(OptimConfig(name="sgd", lr=0.1), model))
        parts = split_micro_batches(labeled, unlabeled, micro_batch)
        assert len(parts) == 4 // micro_batch
        losses = []
        for number, (x, u) in enumerate(parts, 1):
            with sync_gradients(model, enabled=number == len(parts)):
                losses.append(method.losses(Student(model), x, u, FIRST))
                stepper.backward(losses[-1]["loss"] / len(parts))
        stepper.step()
        found.append((model.state_dict(), mean_losses(losses)))
    torch.testing.assert_close(found[0], found[1])


def test_micro_batches_slice_every_field():
    method = make_method("unimatch")
    labeled, unlabeled = random_batches(method, 4, 4)
    parts = split_micro_batches(labeled, unlabeled, 2)
    assert torch.equal(torch.cat([x.mask for x, _ in parts]), labeled.mask)
    for name in ("weak", "valid"):
        assert torch.equal(torch.cat([getattr(u, name) for _, u in parts]), getattr(unlabeled, name))
    for name in ("strong", "cutmix"):
        for number, view in enumerate(getattr(unlabeled, name)):
            assert torch.equal(torch.cat([getattr(u, name)[number] for _, u in parts]), view)
    assert split_micro_batches(labeled, None, 4)[0][1] is None


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_clipping_equals_torch(clip_norm):
    model = small_model()
    other = copy.deepcopy(model)
    cfg = OptimConfig(name="sgd", lr=0.1, lr_multi=1.0)
    go(model, Stepper(model, build_optimizer(cfg, model), "fp32", clip_norm), images(0))
    optimizer = torch.optim.SGD(other.parameters(), cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    other(images(0)).square().mean().backward()
    nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
    optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_of_a_cpu(precision):
    with pytest.raises(UserError, match=rf"precision={precision}.*choose fp32 or bf16"):
        set_precision(precision, CPU)


def test_fp32_is_float32():
    set_precision("fp32", CPU)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize("name", ["allspark", "fixmatch", "unimatch", "imas", "pseudoseg"])
def test_bf16_keeps_float32_weights(name, bottleneck):
    """Logits and losses come out as float32; the memory is float32 and its classes are those of fp32 arithmetic."""
    found = []
    for precision in ("fp32", "bf16"):
        model = make_model(bottleneck, dropout=0.0, drop_path=0.0)
        method = make_method(name)
        method.attach(model)
        labeled, unlabeled = random_batches(method)
        stepper = Stepper(model, build_optimizer(OPTIMS[0], model), precision)
        torch.manual_seed(3)
        with autocast(precision, CPU):
            losses = method.losses(Student(model), labeled, unlabeled, FIRST)
            assert model(unlabeled.weak).logits.dtype == torch.float32
        stepper.backward(losses["loss"])
        # A pass without gradients comes first; torch 2.8's autocast would give its casts to the pass that learns
        assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
        stepper.step()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        found.append(losses["loss"].item())
    assert found[0] != found[1] and abs(found[0] - found[1]) < 0.03 * found[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_cast_at_once_are_those_of_autocast(checkpointing):
    """Losses and gradients bit for bit, also of a network with a frozen layer; afterwards the weights are back."""
    found = []
    for at_once in (False, True):
        model = make_model("none", dropout=0.0, drop_path=0.0)
        model.encoder.set_grad_checkpointing(checkpointing)
        block = model.encoder.blocks[1]
        block.requires_grad_(False)
        parameters = dict(model.named_parameters())
        labeled, _ = random_batches(make_method("fixmatch"))
        with (
            autocast("bf16", CPU),
            cast_weights([model.encoder], torch.bfloat16) if at_once else contextlib.nullcontext(),
        ):
            assert block.ffn.fc1.weight.dtype == (torch.bfloat16 if at_once else torch.float32)
            loss = model(labeled.image).logits.square().mean()
        loss.backward()
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in parameters.values())
        found.append([loss, *(parameter.grad for parameter in parameters.values() if parameter.requires_grad)])
    assert all(map(torch.equal, *found)) and all(grad.dtype == torch.float32 for grad in found[1])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fp16_steps_are_those_of_fp32(name):
    """Loss scaling is undone before gradients are clipped, and a skipped step changes nothing."""
    ends = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).train()
        optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), model)
        stepper = Stepper(model, optimizer, precision, clip_norm=0.01)
        for seed, value in ((0, 1.0), (1, math.nan), (2, 1.0)):
            image = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * value
            stepper.backward(model(image).square().mean())
            stepper.step()
        ends.append((model.state_dict(), int(stepper.skipped)))
    assert ends[0][1] == ends[1][1] == 1
    torch.testing.assert_close(ends[0][0], ends[1][0])
