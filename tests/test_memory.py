"""Semantic memory and channel grouping against literal loops."""

import numpy as np
import torch
import torch.nn.functional as F

from allspark.models.memory import SemanticMemory, group_channels


def loop_enqueue(queue, pointer, features, classes):
    """One write at a time: image by image, channels ascending, the ring wraps."""
    slots = queue.shape[1]
    for image, labels in zip(features, classes, strict=True):
        for channel, k in zip(image, labels.tolist(), strict=True):
            queue[k, pointer[k]] = channel
            pointer[k] = (pointer[k] + 1) % slots


def test_enqueue_equals_a_loop_over_40_steps():
    generator = torch.Generator().manual_seed(3)
    memory = SemanticMemory(num_classes=5, channels=7, side=2)
    queue, pointer = memory.queue.clone(), memory.pointer.clone()
    for step in range(40):
        batch = step % 3 + 1  # up to 21 rows for 7 slots: more than a ring holds when they are of one class
        features = torch.randn(batch, 7, 4, generator=generator)
        high = 1 if step % 5 == 0 else 5
        classes = torch.randint(0, high, (batch, 7), generator=generator)
        memory.enqueue(features, classes)
        loop_enqueue(queue, pointer, features, classes)
        assert torch.equal(memory.queue, queue), step
        assert torch.equal(memory.pointer, pointer), step


def test_read_is_a_snapshot():
    """A later write must not change what the backward pass of this step sees."""
    memory = SemanticMemory(2, 3, 2)
    before = memory.read()
    assert before.shape == (2, 4, 3)
    kept = before.clone()
    memory.enqueue(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long))
    assert torch.equal(before, kept)


def test_grouping_equals_a_loop():
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 6, 3, 4, generator=generator)
    maps = torch.randn(2, 5, 30, 40, generator=generator)
    resized = F.interpolate(maps, (3, 4), mode="bilinear", align_corners=False)
    expected = np.zeros((2, 6), dtype=int)
    for b in range(2):
        for c in range(6):
            channel = features[b, c].flatten().numpy()
            cosine = [
                channel @ (m := resized[b, k].flatten().numpy()) / np.linalg.norm(channel) / np.linalg.norm(m)
                for k in range(5)
            ]
            expected[b, c] = int(np.argmax(cosine))
    assert group_channels(features, maps).tolist() == expected.tolist()


def test_grouping_ties_take_the_lowest_class():
    features = torch.randn(1, 4, 2, 2)
    maps = torch.ones(1, 3, 2, 2)
    assert group_channels(features, maps).eq(0).all()
