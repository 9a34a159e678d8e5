"""Class-wise thresholds against sorted confidences, and their effect on the loss."""

import pytest
import torch

from allspark.methods.base import pseudo_loss
from allspark.methods.self_training import BINS, ClassThresholds
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo, confident
from allspark.utils.errors import UserError
from helpers.networks import CLASSES, FIRST, attached, make_method, make_model, random_batches


def some_labels(confidence, label):
    """Pseudo-labels of one image, a row of pixels."""
    shape = (1, 1, len(label))
    return Pseudo(torch.empty(0), torch.tensor(label).view(shape), torch.tensor(confidence).view(shape))


def uneven(seed, pixels=4000):
    """Class 0 is sure, 1 less, 2 never; 3 is not predicted."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), pixels, replacement=True, generator=generator)
    top = torch.tensor([1.0, 0.97, 0.6])[label]
    return top - 0.3 * torch.rand(pixels, generator=generator), label


@pytest.mark.parametrize("threshold", [0.7, 0.9, 0.95])
def test_every_class_keeps_the_same_share(threshold):
    confidence, label = uneven(0)
    thresholds = ClassThresholds(4, threshold)
    valid = torch.rand(1, 1, len(label), generator=torch.Generator().manual_seed(1)) < 0.8
    thresholds.update(some_labels(confidence.tolist(), label.tolist()), valid)
    confidence, label = confidence[valid.flatten()], label[valid.flatten()]
    share = (confidence >= threshold).float().mean().item()
    for index, found in enumerate(thresholds().tolist()[:3]):
        own = confidence[label == index].sort(descending=True).values
        expected = min(own[max(round(share * len(own)) - 1, 0)].item(), threshold)
        assert abs(found - expected) < 2 / BINS, index
    assert thresholds()[2] < 0.6 < threshold and thresholds()[0] == thresholds()[3] == torch.tensor(threshold)


def test_old_pixels_count_less():
    thresholds = ClassThresholds(2, 0.9, momentum=0.5)
    halves = [0.95] * 2 + [0.5] * 2, [0] * 2 + [1] * 2
    for _ in range(30):
        for _ in range(2):  # passes: what was counted ages by the step
            thresholds.update(some_labels(*halves), torch.ones(1, 1, 4, dtype=torch.bool))
        thresholds.after_step()
    assert thresholds.histogram.sum() == pytest.approx(8, abs=1e-3)  # 8 (1/2 + 1/4 + ...)
    assert thresholds().tolist() == pytest.approx([0.9, 0.5])


def test_default_is_common_threshold():
    thresholds = ClassThresholds(2, 0.9)
    assert thresholds().tolist() == pytest.approx([0.9, 0.9])
    pseudo = some_labels([0.5, torch.nan, 0.6], [0, 1, 1])
    thresholds.update(pseudo, torch.ones(1, 1, 3, dtype=torch.bool))
    assert thresholds().tolist() == pytest.approx([0.9, 0.9])  # of no class more is kept than of all: nothing
    assert thresholds.histogram.sum() == 2  # a pixel without a confidence is none


def test_follows_device_of_network():
    """On a device that is not the default one: recipes move the network before the method is attached."""
    model, method = make_model("none").to("meta"), make_method("allspark", threshold=0.5, class_thresholds=True)
    method.attach(model)
    assert {tensor.device.type for tensor in (*method.parameters(), *method.buffers())} == {"meta"}


def test_method_ages_counts():
    model, method = attached("allspark", threshold=0.5, class_thresholds=True)
    method.losses(Student(model), *random_batches(method), FIRST)
    counted = method.class_thresholds.histogram.sum().item()
    method.after_step(Student(model), FIRST)
    assert method.class_thresholds.histogram.sum().item() == pytest.approx(0.99 * counted)


def test_threshold_per_class_in_loss():
    logits = torch.randn(1, 2, 1, 4)
    pseudo = some_labels([0.8, 0.6, 0.8, 0.6], [0, 0, 1, 1])
    loss, ratio = pseudo_loss(logits, pseudo, torch.tensor([0.9, 0.7]), torch.ones(1, 1, 4, dtype=torch.bool))
    assert ratio == 0.25
    torch.testing.assert_close(loss, -logits.log_softmax(1)[0, 1, 0, 2] / 4)


def test_nan_is_not_confident():
    label, confidence = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0.9, float("nan"), 0.8]]])
    assert confident(label, confidence, 0.5).tolist() == [[[True, False, True]]]
    assert confident(label, confidence, torch.tensor([0.95, 0.7])).tolist() == [[[False, False, True]]]
    assert confident(label, confidence, None) is None


def test_learns_from_unsure_class():
    """One threshold leaves it out, thresholds of its own do not; measuring changes nothing; a checkpoint has them."""
    ratios = {}
    for wanted in (False, True):
        model, method = attached("allspark", threshold=0.5, class_thresholds=wanted)
        labeled, unlabeled = random_batches(method)
        with torch.no_grad():
            model.decoder.classifier.weight.mul_(8)
        losses = method.losses(Student(model), labeled, unlabeled, FIRST)
        ratios[wanted] = losses["mask_ratio"].item()
    assert ratios[True] > ratios[False] > 0
    state = {key: value.clone() for key, value in method.class_thresholds.state_dict().items()}
    method.pseudo_labels(Student(model), unlabeled.weak, unlabeled.valid)
    assert method.thresholds().shape == (CLASSES,) and method.thresholds().min() < 0.5
    assert all(torch.equal(state[key], value) for key, value in method.class_thresholds.state_dict().items())
    assert "class_thresholds.histogram" in method.state_dict()


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_needs_a_threshold(threshold):
    with pytest.raises(UserError, match=r"class_thresholds=true needs .*method.threshold=0.95"):
        make_method("allspark", class_thresholds=True, threshold=threshold)
