"""Recorded numbers of the released AllSpark code (tests/golden), reproduced from the released names.

Weights and inputs come from a formula, so that the files hold results only: see `formula`, `image` and `label`.
"""

import numpy as np
import pytest
import torch

from allspark.config import BottleneckConfig, ModelConfig, OptimConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.engine.optim import build_optimizer, poly_lr, set_lr
from allspark.losses import OHEM, CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.segmentor import build_model
from allspark.models.student import Student, predict
from helpers.networks import double
from helpers.released import GOLDEN, NAMES, close, formula, image, label, rename_released

pytestmark = pytest.mark.usefixtures("one_thread")


def released_model(config, classes, crop, heads=2):
    """A model of ours filled through the released names; every released name must find its place."""
    bottleneck = BottleneckConfig(name="none" if "baseline" in config else "allspark", num_heads=heads, dropout=0.0)
    cfg = ModelConfig(encoder="mit_b0", drop_path=0.0, dropout=0.0, bottleneck=bottleneck)
    model = build_model(cfg, classes, crop)
    state = {rename_released(name): formula(name, shape) for name, shape in NAMES[config].items()}
    model.load_state_dict(state, strict=True)
    return model


def test_encoder():
    golden = np.load(GOLDEN / "encoder_b0_2x65x97.npz")
    model = released_model("b0_pascal_crop65", 21, 65).eval()
    with torch.no_grad():
        for name, feature in zip(("c1", "c2", "c3", "c4"), model.encoder(image(1, 2, 65, 97)), strict=True):
            close(feature, golden[name])


@pytest.mark.parametrize(
    ("case", "config", "classes", "crop", "inputs", "share_keys"),
    [
        ("eval_b0_pascal_1x65x65", "b0_pascal_crop65", 21, 65, (2, 1, 65, 65), False),
        ("eval_b0_pascal_1x97x65", "b0_pascal_crop65", 21, 65, (3, 1, 97, 65), False),
        ("eval_b0_pascal_2x65x65_batch_context", "b0_pascal_crop65", 21, 65, (4, 2, 65, 65), True),
        ("eval_b0_city_1x129x129", "b0_city_crop129", 19, 129, (5, 1, 129, 129), False),
        ("eval_b0_baseline_1x65x65", "b0_pascal_baseline", 21, 65, (2, 1, 65, 65), False),
    ],
)
def test_evaluation(case, config, classes, crop, inputs, share_keys):
    golden = np.load(GOLDEN / f"{case}.npz")
    logits = predict(released_model(config, classes, crop), image(*inputs), share_keys).logits
    close(logits.mean((2, 3)), golden["logits_mean"])
    close(logits[:, :, ::4, ::4], golden["logits_sub"])


TRAIN_CASES = {  # config, classes, batch, crop, heads, memory read, seeds of image_x, label, image_u, criterion
    "train_b0_pascal_2x65_memory": ("b0_pascal_crop65", 21, 2, 65, 2, True, (30, 40, 50), CrossEntropy()),
    "train_b0_pascal_2x65_warmup": ("b0_pascal_crop65", 21, 2, 65, 2, False, (30, 40, 50), CrossEntropy()),
    "train_b0_pascal_1x97_heads1": ("b0_pascal_crop97_heads1", 21, 1, 97, 1, True, (60, 70, 80), CrossEntropy()),
    "train_b0_city_2x65_ohem_thresh": ("b0_city_crop65", 19, 2, 65, 2, True, (50, 60, 70), OHEM(0.05, 2000)),
    "train_b0_city_2x65_ohem_minkept": ("b0_city_crop65", 19, 2, 65, 2, True, (50, 60, 70), OHEM(0.02, 2000)),
    "train_b0_coco_2x65_81classes": ("b0_coco_crop65", 81, 2, 65, 2, True, (70, 80, 90), CrossEntropy()),
}


def batches(seeds, batch, crop, classes):
    labeled = LabeledBatch(image(seeds[0], batch, crop, crop), label(seeds[1], batch, crop, crop, classes))
    padding = torch.ones(batch, crop, crop, dtype=torch.bool)
    return labeled, UnlabeledBatch(image(seeds[2], batch, crop, crop), (), padding, ())


@pytest.mark.parametrize("case", TRAIN_CASES)
def test_train_step(case):
    """In float64: the two largest logits of one pixel differ by 5e-6, which is as small as the rounding of float32."""
    golden = np.load(GOLDEN / f"{case}.npz")
    config, classes, batch, crop, heads, read, seeds, criterion = TRAIN_CASES[case]
    model = released_model(config, classes, crop, heads).train().double()
    labeled, unlabeled = map(double, batches(seeds, batch, crop, classes))
    pseudo = predict(model, unlabeled.weak, share_keys=True)
    close(pseudo.logits[:, :, ::4, ::4], golden["pseudo_logits"])
    assert torch.equal(pseudo.label, torch.from_numpy(golden["pseudo_label"]).long())

    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    method = METHODS["allspark"](criterion)
    losses = method.losses(
        Student(model, read_memory=read), labeled, unlabeled, Progress(step=0, epoch=0, total_steps=1)
    )
    losses["loss"].backward()
    close(outputs[-1].detach()[:, :, ::4, ::4], golden["pred"])
    for name in ("loss", "loss_x", "loss_u"):
        assert abs(losses[name].item() - golden[name]) < 1e-5, name
    memory = model.bottleneck.memory
    assert torch.equal(memory.pointer, torch.from_numpy(golden["queue_ptr"]))
    np.testing.assert_allclose(memory.queue.sum(2).numpy(), golden["kv_queue_sum"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(memory.queue.abs().sum(2).numpy(), golden["kv_queue_abs"], atol=1e-3, rtol=0)
    parameters = dict(model.named_parameters())
    assert len(golden["grad_names"]) == len(parameters)
    for name, norm in zip(golden["grad_names"], golden["grad_norms"], strict=True):
        grad = parameters[rename_released(str(name))].grad
        assert (grad is None) == bool(np.isnan(norm)), name
        if grad is not None:
            assert abs(grad.norm().item() - norm) <= max(0.01 * norm, 1e-6), name


def test_ohem():
    golden = np.load(GOLDEN / "ohem.npz")
    logits = torch.from_numpy((np.random.RandomState(7).standard_normal((2, 19, 33, 29)) * 2.5).astype(np.float32))
    mask = label(8, 2, 33, 29, 19)
    assert abs(CrossEntropy()(logits, mask).item() - golden["plain_ce"]) < 1e-5
    for (thresh, min_kept), loss in zip(golden["params"], golden["loss"], strict=True):
        assert abs(OHEM(thresh, int(min_kept))(logits, mask).item() - loss) < 1e-5, (thresh, min_kept)


def test_trajectory():
    """12 steps of the loop's own parts: the schedule, the two groups, the memory's warm-up, the optimizer.

    In float64: in float32 a pseudo-label of two equal logits falls one way or the other, by processor and torch.
    """
    golden = np.load(GOLDEN / "trajectory_b0_pascal_2x65_12it.npz")
    model = released_model("b0_pascal_crop65", 21, 65).train().double()
    cfg = OptimConfig(name="sgd", lr=0.001, lr_multi=10.0, weight_decay=1e-4, lr_one_step_late=True)
    optimizer = build_optimizer(cfg, model)
    method = METHODS["allspark"](CrossEntropy())
    for step in range(12):
        set_lr(optimizer, poly_lr(cfg, step, 12))
        labeled, unlabeled = map(double, batches([seed + 100 * step for seed in (1000, 1010, 1020)], 2, 65, 21))
        losses = method.losses(
            Student(model, read_memory=step >= 4), labeled, unlabeled, Progress(step, epoch=step, total_steps=12)
        )
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        actual = [losses[name].item() for name in ("loss_x", "loss_u", "loss")]
        np.testing.assert_allclose(actual, golden["losses"][step], atol=1e-5, rtol=0)
        assert torch.equal(model.bottleneck.memory.pointer, torch.from_numpy(golden["queue_ptrs"][step]))
    parameters = dict(model.named_parameters())
    for name, norm in zip(golden["param_names"], golden["param_norms"], strict=True):
        assert abs(parameters[rename_released(str(name))].norm().item() / norm - 1) < 1e-4, name
    np.testing.assert_allclose(model.decoder.fuse.bn.running_mean.numpy(), golden["bn_mean"], rtol=1e-4, atol=1e-5)
