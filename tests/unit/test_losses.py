"""The labeled losses against literal loops, their denominators, and batches without a valid pixel."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from allspark.build import build_method, complete
from allspark.config_io import load_recipe
from allspark.data.datasets import spec_for
from allspark.losses import OHEM, CrossEntropy, Dice, WithDice, build_criterion, consistency_loss
from allspark.utils.errors import UserError


@pytest.mark.parametrize(
    ("thresh", "min_kept"), [(0.3, 0), (0.0, 0), (0.3, 20), (0.3, 60), (0.9, 5), (0.3, 95), (0.3, 1000)]
)
def test_ohem_equals_loop(thresh, min_kept):
    """Sorted by probability of the true class, ignored pixels last; plain where there are fewer than min_kept."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 10, generator=generator)
    mask = torch.randint(0, 4, (2, 5, 10), generator=generator)
    mask[0, 0] = 255  # 90 of 100 pixels are left
    probs, losses = [], []
    for i, y, x in itertools.product(range(2), range(5), range(10)):
        label = mask[i, y, x].item()
        prob = 1.0 if label == 255 else logits[i, :, y, x].double().softmax(0)[label].item()
        probs.append(prob)
        losses.append(0.0 if label == 255 else -math.log(prob))
    limit = max(thresh, sorted(probs)[min(min_kept, 100) - 1]) if min_kept else 1.0  # Released: 0 means no mining
    valid = (mask != 255).flatten().tolist()
    kept = [ok and (prob <= limit or sum(valid) < min_kept) for ok, prob in zip(valid, probs)]
    expected = sum(loss for loss, keep in zip(losses, kept) if keep) / max(sum(kept), 1)
    assert abs(OHEM(thresh, min_kept)(logits, mask).item() - expected) < 1e-5


def test_ohem_in_deterministic_mode():
    """By sorting, because kthvalue has no deterministic implementation on a GPU in torch 2.6."""
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 5, 8, 9), torch.randint(0, 5, (2, 8, 9))
    for kept in (1, 20, 10**6):
        expected = OHEM(0.1, kept)(logits, mask)
        torch.use_deterministic_algorithms(True)
        try:
            assert OHEM(0.1, kept)(logits, mask) == expected
        finally:
            torch.use_deterministic_algorithms(False)


def test_min_kept_in_proportion_to_the_images():
    """What a process of 2 images keeps, one of 6 keeps three times."""
    logits, mask = torch.randn(6, 3, 5, 4), torch.randint(3, (6, 5, 4))
    for count, least in ((1, 6), (2, 11), (4, 22), (6, 33)):
        batch = logits[:count], mask[:count]
        assert torch.equal(OHEM(0.0, 11, images=2)(*batch), OHEM(0.0, least)(*batch))


def test_min_kept_binds():
    """All pixels are easy, so the threshold alone keeps none: the hardest min_kept are used, with 0 all of them."""
    logits, mask = torch.zeros(1, 2, 10, 10), torch.zeros(1, 10, 10, dtype=torch.long)
    logits[0, 0] = torch.linspace(1.5, 6, 100)[torch.randperm(100)].view(10, 10)  # probabilities from 0.82 on
    losses = np.sort(np.log1p(np.exp(-logits[0, 0].double().numpy())).ravel())[::-1]
    for min_kept in (0, 1, 30, 100):
        expected = losses[: min_kept or 100].mean()
        assert abs(OHEM(0.7, min_kept)(logits, mask).item() - expected) < 1e-6


def test_label_above_ignore_index_raises():
    with pytest.raises((IndexError, RuntimeError)):
        CrossEntropy()(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 7))


def test_class_weights():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    mask[0, :2] = 255
    weights = (0.5, 0.0, 4.0)
    expected = F.cross_entropy(logits, mask, torch.tensor(weights), ignore_index=255)
    torch.testing.assert_close(CrossEntropy(255, weights)(logits, mask), expected)
    assert not CrossEntropy(255, weights).state_dict()  # a checkpoint without them goes on


def test_dice():
    """Against sets of pixels: hard predictions, a class without a label, an ignored corner."""
    torch.manual_seed(0)
    mask, predicted = torch.randint(0, 3, (2, 6, 6)), torch.randint(0, 4, (2, 6, 6))
    mask[:, :2, :2] = 255
    logits = 100.0 * F.one_hot(predicted, 4).permute(0, 3, 1, 2)
    scores = []
    for index in range(3):
        truth = {tuple(place) for place in (mask == index).nonzero().tolist()}
        found = {tuple(place) for place in ((predicted == index) & (mask != 255)).nonzero().tolist()}
        scores.append(2 * len(truth & found) / (len(truth) + len(found)))
    torch.testing.assert_close(Dice(255)(logits, mask), torch.tensor(1 - sum(scores) / 3))
    both = build_criterion("ce", 255, thresh=0.7, min_kept=0, dice=0.5)(logits, mask)
    torch.testing.assert_close(both, CrossEntropy(255)(logits, mask) + 0.5 * Dice(255)(logits, mask))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"criterion.class_weights": [1, 2]}, r"class_weights=\[1.0, 2.0\]: give 11 numbers.*sky"),
        ({"criterion.class_weights": [0] * 11}, "not all 0"),
        ({"criterion.class_weights": [-1] + [1] * 10}, "at least 0"),
        ({"criterion.class_weights": [1] * 11, "criterion": "ohem"}, "use criterion=ce"),
        ({"criterion.dice": -1}, "criterion.dice=-1.0 must be at least 0"),
    ],
)
def test_class_weights_mismatch(words, message):
    with pytest.raises(UserError, match=f"(?i){message}"):
        recipe = load_recipe("camvid", "supervised", words)
        build_method(recipe, spec_for(recipe.data))


def test_recipe_options_reach_the_loss():
    logits, mask = torch.randn(2, 11, 20, 20), torch.randint(0, 12, (2, 20, 20))
    mask[mask == 11] = 255
    weights = [0.5, *[2.0] * 10]

    def loss(count=2, **given):
        recipe = load_recipe("camvid", "supervised", {f"criterion.{key}": value for key, value in given.items()})
        criterion = build_method(complete(recipe), spec_for(recipe.data)).criterion
        return criterion(logits[:count], mask[:count])

    expected = CrossEntropy(255, weights)(logits, mask) + 0.5 * Dice(255)(logits, mask)
    torch.testing.assert_close(loss(class_weights=weights, dice=0.5), expected)
    options = {"name": "ohem", "thresh": 0.0, "min_kept": 100, "min_kept_images": 1}
    for count in (1, 2):
        torch.testing.assert_close(loss(count, **options), OHEM(0.0, 100 * count)(logits[:count], mask[:count]))


def test_empty_losses_are_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    ignored = torch.full((2, 4, 4), 255)
    weighted = CrossEntropy(weights=(1.0, 2.0, 0.0))
    for criterion in (CrossEntropy(), OHEM(0.7, 100), weighted, WithDice(CrossEntropy(), 1.0)):
        loss = criterion(logits, ignored)
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(logits.grad).all()
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    loss, ratio = consistency_loss(logits, ignored.clamp(max=2), None, nothing)
    assert loss.item() == 0 and ratio.item() == 0


def test_consistency_divides_by_valid_pixels():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    keep, valid = torch.rand(2, 4, 4) < 0.5, torch.rand(2, 4, 4) < 0.8
    each = F.cross_entropy(logits, label, reduction="none")
    loss, ratio = consistency_loss(logits, label, keep, valid)
    torch.testing.assert_close(loss, each[keep & valid].sum() / valid.sum())
    torch.testing.assert_close(ratio, (keep & valid).sum() / valid.sum())
