"""MaskMatch: masks, multi-scale labels and the whole step against literal loops; edge cases of batches."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from allspark.methods import Progress
from allspark.methods.maskmatch import hide_patches, predict_multi_scale
from allspark.models.bottleneck import CrossBatch
from allspark.models.student import Student
from allspark.utils.errors import UserError
from helpers.networks import CROP, FIRST, make_method, make_model, quiet_model, random_batches

THRESHOLD = 0.3  # of an untrained network on 5 classes: some pixels are confident, some are not


def hidden_patches(image, size):
    """Which patches are 0, by loops; each has to be 0 altogether or nowhere."""
    patches: dict[tuple[int, int], set[bool]] = {}
    counts = [math.ceil(side / size) for side in image.shape[-2:]]
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            places = zip((row, column), counts, image.shape[-2:], strict=True)
            patch = tuple(place * count // side for place, count, side in places)
            patches.setdefault(patch, set()).add(not image[:, row, column].any())
    assert all(len(states) == 1 for states in patches.values())
    return [state.pop() for state in patches.values()]


@pytest.mark.parametrize("size", [(65, 65), (64, 97), (33, 32)])
@pytest.mark.parametrize("patch_size", [16, 32, 100])
@pytest.mark.parametrize("masked", [0.0, 0.3, 0.7, 1.0])
def test_exact_number_of_hidden_patches(size, patch_size, masked):
    image = torch.rand(3, 3, *size) + 1
    view = hide_patches(image, patch_size, masked)
    number = math.ceil(size[0] / patch_size) * math.ceil(size[1] / patch_size)
    for before, after in zip(image, view, strict=True):
        hidden = hidden_patches(after, patch_size)
        assert len(hidden) == number and sum(hidden) == round(masked * number)
        assert torch.equal(after[after != 0], before[after != 0])


def test_patch_choice_is_uniform():
    """4 patches, 2 hidden: six choices, for every image of its own and for every step anew."""
    torch.manual_seed(0)
    images = torch.ones(3000, 1, 4, 5)
    first, second = (hide_patches(images, 3, 0.5) for _ in range(2))
    choices = Counter(tuple(np.flatnonzero(hidden_patches(image, 3))) for image in first)
    assert set(choices) == set(combinations(range(4), 2))
    assert all(abs(count / 3000 - 1 / 6) < 0.03 for count in choices.values())  # 4 standard deviations
    same = (first == second).flatten(1).all(1).float().mean().item()
    assert abs(same - 1 / 6) < 0.03
    torch.manual_seed(0)
    assert torch.equal(hide_patches(images, 3, 0.5), first)


def bilinear(x, height, width):
    """x (C, h, w) numpy at another size, pixel by pixel; corners are not aligned."""
    out = np.empty((len(x), height, width))
    for row in range(height):
        for column in range(width):
            y = max((row + 0.5) * x.shape[1] / height - 0.5, 0)
            z = max((column + 0.5) * x.shape[2] / width - 0.5, 0)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, x.shape[1] - 1), min(left + 1, x.shape[2] - 1)
            upper = x[:, top, left] * (1 - z + left) + x[:, top, right] * (z - left)
            lower = x[:, bottom, left] * (1 - z + left) + x[:, bottom, right] * (z - left)
            out[:, row, column] = upper * (1 - y + top) + lower * (y - top)
    return out


@pytest.mark.parametrize(
    ("size", "scales", "sizes"),
    [
        ((65, 65), (0.5, 1.0, 1.5), [(32, 32), (65, 65), (98, 98)]),
        ((45, 77), (0.5, 0.75), [(32, 38), (34, 58)]),  # neither a multiple of 32 nor, at 0.5, of 32 or more
    ],
)
def test_labels_are_mean_over_scales(size, scales, sizes):
    model = quiet_model(seed=1)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    pseudo = predict_multi_scale(Student(model), image, scales)
    assert model.training and not pseudo.logits.requires_grad
    model.eval()
    for index in range(2):
        mean = np.zeros((5, *size))
        for height, width in sizes:
            scaled = torch.from_numpy(bilinear(image[index].numpy(), height, width)).float()
            with torch.no_grad():
                prob = model(scaled[None]).logits.softmax(1)[0].numpy()
            mean += bilinear(prob, *size) / len(sizes)
        prob, best = pseudo.logits[index].softmax(0).numpy(), np.sort(mean, 0)
        assert np.abs(prob - mean).max() < 1e-5
        assert np.abs(pseudo.confidence[index].numpy() - best[-1]).max() < 1e-5
        clear = best[-1] - best[-2] > 1e-4
        assert clear.mean() > 0.9 and np.array_equal(pseudo.label[index].numpy()[clear], mean.argmax(0)[clear])


def test_zero_probability():
    model = quiet_model().eval()
    with torch.no_grad():
        model.decoder.classifier.bias.copy_(torch.tensor([500.0, 0, 0, 0, 0]))
    pseudo = predict_multi_scale(Student(model), torch.randn(1, 3, 32, 32), (1.0,))
    assert pseudo.logits.isfinite().all() and pseudo.confidence.eq(1).all() and pseudo.label.eq(0).all()


def loop_loss(logits, prob, source, valid):
    """Pixel by pixel: source (B, H, W) says from which image the label is -> loss over valid pixels, share of them."""
    log_prob, prob = (x.detach().double().numpy() for x in (logits.log_softmax(1), prob))
    total, count, pixels = 0.0, 0, 0
    for i in range(len(logits)):
        for row in range(CROP):
            for column in range(CROP):
                image = source[i, row, column]
                if not valid[image, row, column]:
                    continue
                pixels += 1
                label = prob[image, :, row, column].argmax()
                if prob[image, label, row, column] >= THRESHOLD:
                    total -= log_prob[i, label, row, column]
                    count += 1
    assert 0 < count < pixels
    return total / pixels, count / pixels


@pytest.mark.parametrize(
    ("bottleneck", "batch_u", "ignore_padding"),
    [("none", 2, True), ("none", 3, True), ("none", 2, False), ("allspark", 2, True)],
)
def test_step_literal(bottleneck, batch_u, ignore_padding):
    """The teacher labels; the strong view gets CutMix and goes with the labeled images, the masked view gets none."""
    method = make_method("maskmatch", threshold=THRESHOLD, ignore_padding=ignore_padding)
    method.attach(quiet_model(bottleneck))
    labeled, unlabeled = random_batches(method, batch_u=batch_u)
    model = quiet_model(bottleneck, seed=3)
    torch.manual_seed(5)
    losses = method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)

    prob = predict_multi_scale(Student(quiet_model(bottleneck)), unlabeled.weak, (0.5, 1.0, 1.5)).logits.softmax(1)
    model, box, strong = quiet_model(bottleneck, seed=3), unlabeled.cutmix[0], unlabeled.strong[0]
    own = np.tile(np.arange(batch_u)[:, None, None], (1, CROP, CROP))
    source = np.where(box.numpy(), (own - 1) % batch_u, own)
    mixed, class_maps = strong.clone(), prob.log()
    for i in range(batch_u):
        mixed[i][:, box[i]] = strong[i - 1][:, box[i]]
    class_maps = torch.stack([torch.where(box[i], class_maps[i - 1], class_maps[i]) for i in range(batch_u)])
    torch.manual_seed(5)
    masked = hide_patches(strong, 32, 0.7)
    on = bottleneck == "allspark"
    with torch.no_grad():
        cross = CrossBatch(2, class_maps, read_memory=True) if on else None
        logits = model(torch.cat((labeled.image, mixed)), cross=cross).logits
        logits_m = model(masked, cross=CrossBatch(0) if on else None).logits
    valid = unlabeled.valid.numpy() if ignore_padding else np.ones_like(unlabeled.valid.numpy())
    x = F.cross_entropy(logits[:2], labeled.mask).item()
    s, ratio = loop_loss(logits[2:], prob, source, valid)
    lcr, _ = loop_loss(logits_m, prob, own, valid)
    expected = {"loss": (x + 0.5 * s + 0.5 * lcr) / 2, "loss_x": x, "loss_u_s": s, "loss_u_lcr": lcr}
    expected["mask_ratio"] = ratio
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(losses[name].item() - value) < 2e-5, name


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize(("batch_x", "batch_u"), [(1, 1), (2, 3)])
def test_edges_of_a_batch(bottleneck, batch_x, batch_u):
    """One image, an odd number; an image that is all padding; nothing confident: the labeled loss is left."""
    model, method = make_model(bottleneck), make_method("maskmatch", threshold=1.0)
    method.attach(model)
    labeled, unlabeled = random_batches(method, batch_x, batch_u)
    unlabeled.valid[0] = False
    losses = method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)
    losses["loss"].backward()
    assert losses["loss_u_s"] == losses["loss_u_lcr"] == 0
    torch.testing.assert_close(losses["loss"], losses["loss_x"] / 2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    padding = replace(unlabeled, valid=torch.zeros_like(unlabeled.valid))
    method.threshold = 0.0
    losses = method.losses(Student(model, read_memory=True), labeled, padding, FIRST)
    assert losses["loss_u_s"] == losses["loss_u_lcr"] == losses["mask_ratio"] == 0


def test_teacher_has_no_memory():
    model, method = make_model("allspark"), make_method("maskmatch", teacher_momentum=0.9)
    method.attach(model)
    teacher = method.predictor(model)
    assert teacher.bottleneck.memory is None and not any(p.requires_grad for p in teacher.parameters())
    before = teacher.encoder.stages[0].patch_embed.proj.weight.clone()
    weight = model.encoder.stages[0].patch_embed.proj.weight
    with torch.no_grad():
        weight.add_(1.0)
    method.after_step(Student(model, read_memory=True), Progress(99, 0, 100))
    after = teacher.encoder.stages[0].patch_embed.proj.weight
    torch.testing.assert_close(after, 0.9 * before + 0.1 * weight)


@pytest.mark.parametrize(
    "options",
    [
        {"masked": 1.5},
        {"masked": math.nan},
        {"patch_size": 0},
        {"scales": ()},
        {"scales": (0.0, 1.0)},
        {"threshold": 95.0},
        {"teacher_momentum": 1.0},
    ],
)
def test_bad_options(options):
    with pytest.raises(UserError, match=f"method.{next(iter(options))}="):
        make_method("maskmatch", **options)
