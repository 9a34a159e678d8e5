"""The labeled losses against literal loops; what has no pixel, and denominators, stand in test_methods.py."""

import itertools
import math

import pytest
import torch

from allspark.losses import OHEM, CrossEntropy


@pytest.mark.parametrize(("thresh", "min_kept"), [(0.3, 0), (0.3, 20), (0.3, 60), (0.9, 5), (0.3, 95), (0.3, 1000)])
def test_ohem_equals_a_loop(thresh, min_kept):
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
    limit = max(thresh, sorted(probs)[max(min(min_kept, 100), 1) - 1])
    valid = (mask != 255).flatten().tolist()
    kept = [ok and (prob <= limit or sum(valid) < min_kept) for ok, prob in zip(valid, probs)]
    expected = sum(loss for loss, keep in zip(losses, kept) if keep) / sum(kept)
    assert abs(OHEM(thresh, min_kept)(logits, mask).item() - expected) < 1e-5


def test_labels_beyond_the_ignore_index_fail_loudly():
    with pytest.raises((IndexError, RuntimeError)):
        CrossEntropy()(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 7))
