"""Semantic memory and channel grouping against literal loops; initialization of the bottleneck."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from allspark.config import BottleneckConfig, ModelConfig
from allspark.models.bottleneck import AllSparkBottleneck, CrossBatch
from allspark.models.memory import SemanticMemory, group_channels
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from helpers.networks import loop_enqueue


def test_enqueue_equals_loop():
    generator = torch.Generator().manual_seed(3)
    memory = SemanticMemory(num_classes=5, channels=7, size=2)
    queue, pointer = memory.queue.clone(), memory.pointer.clone()
    written = torch.zeros(5, dtype=torch.long)
    for step in range(40):
        batch = step % 3 + 1  # up to 21 rows for 7 slots: more than a ring holds when they are of one class
        features = torch.randn(batch, 7, 4, generator=generator)
        high = 1 if step % 5 == 0 else 5
        classes = torch.randint(0, high, (batch, 7), generator=generator)
        memory.enqueue(features, classes)
        loop_enqueue(queue, pointer, features, classes)
        assert torch.equal(memory.queue, queue), step
        assert torch.equal(memory.pointer, pointer), step
        written += torch.bincount(classes.flatten(), minlength=5)
        assert torch.equal(memory.filled, written.clamp(max=7)), step


def test_read_is_a_copy():
    """A later write must not change what the backward pass of this step sees."""
    memory = SemanticMemory(2, 3, 2)
    before = memory.read()
    assert before.shape == (2, 4, 3)
    kept = before.clone()
    memory.enqueue(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.long))
    assert torch.equal(before, kept)


def test_grouping_equals_loop():
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


def test_grouping_ties():
    features = torch.randn(1, 4, 2, 2)
    maps = torch.ones(1, 3, 2, 2)
    assert group_channels(features, maps).eq(0).all()


def partly_filled(noise):
    """Class 0 has 3 of 6 slots, class 1 none, class 2 all, class 3 one; the rest is noise."""
    torch.manual_seed(noise)
    memory = SemanticMemory(4, 6, 2)
    generator = torch.Generator().manual_seed(9)
    memory.enqueue(torch.randn(2, 6, 4, generator=generator), torch.tensor([[0, 2, 2, 2, 0, 2], [2, 2, 2, 3, 0, 2]]))
    return memory


def test_read_without_empty_slots():
    memory = partly_filled(noise=1)
    assert memory.filled.tolist() == [3, 0, 6, 1]
    tokens = memory.read(empty_slots=False)
    for k, written in enumerate(memory.filled.tolist()):
        assert torch.equal(tokens[k, :, :written], memory.queue[k, :written].T)
        assert tokens[k, :, written:].eq(0).all()


def attend(empty_slots, noise=1, classes=None):
    """The attention of two labeled images over the memory, or over some of its classes alone."""
    memory = partly_filled(noise)
    torch.manual_seed(4)
    bottleneck = AllSparkBottleneck(6, memory, dropout=0.0, empty_slots=empty_slots)
    tokens = torch.randn(2, 4, 6)
    if classes is not None:
        return bottleneck.cross_branch(tokens, memory.read(empty_slots=False)[classes])
    bottleneck.write_memory = lambda *write: None
    return bottleneck.attend(torch.cat((tokens, tokens)), CrossBatch(num_labeled=2, read_memory=True), (2, 2))[:2]


def test_empty_slots_are_ignored():
    """As if the classes without a written slot did not exist: psi and softmax alike; and no noise is seen."""
    torch.testing.assert_close(attend(False), attend(False, classes=[0, 2, 3]))
    torch.testing.assert_close(attend(False, noise=1), attend(False, noise=2))
    assert not torch.allclose(attend(True, noise=1), attend(True, noise=2))  # Released


def test_memory_without_count_is_full():
    """Files of the released code hold queue and pointer only."""
    state = {name: value for name, value in partly_filled(1).state_dict().items() if name != "filled"}
    memory = SemanticMemory(4, 6, 2)
    memory.load_state_dict(state, strict=True)
    assert memory.filled.tolist() == [6, 6, 6, 6]


def test_grouping_input():
    """Released: the logits. With probabilities the softmax over classes comes first, and other classes win."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(2, 4, 6, generator=generator)
    logits = 3 * torch.randn(2, 4, 20, 20, generator=generator)
    channels = tokens.transpose(1, 2)
    classes = {"logits": group_channels(channels.unflatten(2, (2, 2)), logits)}
    classes["probabilities"] = group_channels(channels.unflatten(2, (2, 2)), logits.softmax(1))
    assert not torch.equal(*classes.values())
    for grouping_input, expected in classes.items():
        memory = SemanticMemory(4, 6, 2)
        AllSparkBottleneck(6, memory, grouping_input=grouping_input).write_memory(tokens, logits, (2, 2))
        assert memory.filled.tolist() == torch.bincount(expected.flatten(), minlength=4).clamp(max=6).tolist()


def test_grouping_by_very_small_probabilities():
    """A class that is improbable everywhere has a direction like any other."""
    tokens, logits = torch.randn(2, 4, 40), torch.randn(2, 4, 20, 20)
    logits[:, 1:] -= torch.tensor([40.0, 60.0, 80.0]).view(3, 1, 1)
    maps = F.interpolate(logits.double().softmax(1), (2, 2), mode="bilinear").flatten(2)
    cosine = (maps / maps.norm(dim=2, keepdim=True)) @ tokens.double()
    expected = cosine.argmax(1).flatten()
    memory = SemanticMemory(4, 40, 2)
    AllSparkBottleneck(40, memory, grouping_input="probabilities").write_memory(tokens, logits, (2, 2))
    assert memory.filled.tolist() == torch.bincount(expected, minlength=4).clamp(max=40).tolist()
    assert len(expected.unique()) > 1


def test_random_grouping_exchanges_the_classes_of_channels():
    tokens, logits = torch.randn(2, 4, 60), 3 * torch.randn(2, 4, 20, 20)
    memories = {}
    for grouping_input in ("logits", "random"):
        memories[grouping_input] = SemanticMemory(4, 60, 2)
        AllSparkBottleneck(60, memories[grouping_input], grouping_input=grouping_input).write_memory(
            tokens, logits, (2, 2)
        )
    semantic, random = memories["logits"], memories["random"]
    assert torch.equal(random.filled, semantic.filled)
    assert not torch.equal(random.queue[:, : random.filled.min()], semantic.queue[:, : random.filled.min()])
    written = {tuple(channel) for channel in tokens.transpose(1, 2).flatten(0, 1).tolist()}
    assert all(tuple(channel) in written for channel in random.queue[0, : random.filled[0]].tolist())


def test_context_of_labeled_images():
    """Labeled images attend to the memory as it was before the step, which then holds their channels."""
    bottleneck = AllSparkBottleneck(6, SemanticMemory(3, 6, 2), dropout=0.0, context="labeled")
    before = bottleneck.memory.queue.clone()
    feature, logits = torch.randn(4, 6, 2, 2), torch.randn(2, 3, 8, 8)
    out = bottleneck(feature, CrossBatch(2, logits, read_memory=True))
    tokens = bottleneck.norm_in(F.gelu(bottleneck.map_in(feature)).flatten(2).transpose(1, 2))
    expected = SemanticMemory(3, 6, 2)
    expected.queue.copy_(before)
    expected.enqueue(
        tokens[:2].transpose(1, 2), group_channels(tokens[:2].transpose(1, 2).unflatten(2, (2, 2)), logits)
    )
    assert torch.equal(bottleneck.memory.queue, expected.queue)
    other = torch.cat((feature[:2], torch.randn(2, 6, 2, 2)))  # without influence on the labeled images
    torch.testing.assert_close(
        bottleneck(other, CrossBatch(2, logits))[:2], bottleneck(feature, CrossBatch(2, logits))[:2]
    )
    bottleneck.memory.queue.copy_(before)
    torch.testing.assert_close(bottleneck(feature, CrossBatch(2, logits, read_memory=True)), out)


def test_context_of_labeled_images_in_a_step():
    """Their own predictions decide the classes of what is written: those of 3 unlabeled images would not fit."""
    cfg = ModelConfig(encoder="mit_b0", bottleneck=BottleneckConfig(name="allspark", context="labeled"))
    student, images = Student(build_model(cfg, 3, 64).train()), torch.randn(5, 3, 64, 64)
    student.joint(images[:2], images[2:], student.predict(images[2:]))
    assert student.model.bottleneck.memory.filled.any()


@pytest.mark.parametrize("mode", ["both", "cross", "none"])
def test_attention_of_ablation(mode):
    """What a branch without attention gives is its residual through the norm; every parameter still gets a gradient."""
    torch.manual_seed(7)
    bottleneck = AllSparkBottleneck(6, SemanticMemory(3, 6, 2), dropout=0.0, attention=mode)
    feature, logits = torch.randn(4, 6, 2, 2), torch.randn(2, 3, 8, 8)
    residual = F.gelu(bottleneck.map_in(feature)).flatten(2).transpose(1, 2)
    plain = F.gelu(bottleneck.map_out(bottleneck.norm_out(residual).transpose(1, 2).unflatten(2, (2, 2))))
    out = bottleneck(feature, CrossBatch(2, logits))
    without = [torch.allclose(part, other, atol=1e-6) for part, other in zip(out, plain, strict=True)]
    assert without == {"both": [False] * 4, "cross": [False] * 2 + [True] * 2, "none": [True] * 4}[mode]
    assert torch.allclose(bottleneck(feature), plain, atol=1e-6) == (mode == "none")  # inference
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in bottleneck.parameters())
    assert bottleneck.memory.filled.any() == (mode != "none")


@pytest.mark.parametrize("labeled", [4, 3, 1])
@pytest.mark.parametrize("read_memory", [False, True])
def test_own_channels_train_as_inference(labeled, read_memory):
    """Every second labeled image comes out as in inference, the others as without the option; of an odd number either
    half, so that where a step has passes of one image half of them do.
    """
    torch.manual_seed(8)
    bottleneck = AllSparkBottleneck(6, SemanticMemory(3, 6, 2), dropout=0.0, own_channels=True)
    feature, cross = torch.randn(labeled + 2, 6, 2, 2), CrossBatch(labeled, torch.randn(2, 3, 8, 8), read_memory)
    inference = bottleneck(feature)
    released = copy.deepcopy(bottleneck).eval()(feature, cross)  # in training alone are there any
    assert not any(torch.allclose(one, other, atol=1e-4) for one, other in zip(released, inference))
    halves, fresh = set(), bottleneck
    for seed in range(20):
        torch.manual_seed(seed)
        bottleneck = copy.deepcopy(fresh)  # with nothing in its memory yet
        out = bottleneck(feature, cross)
        own = tuple(place for place in range(labeled) if torch.allclose(out[place], inference[place], atol=1e-4))
        for place in {*range(labeled + 2)} - {*own}:
            torch.testing.assert_close(out[place], released[place])
        halves.add(own)
    assert halves == {4: {(0, 2)}, 3: {(0, 2), (1,)}, 1: {(0,), ()}}[labeled]
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in bottleneck.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_skip_starts_as_identity(training):
    """The same logits from the same seed; and its last convolution has a gradient."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    logits = {}
    for name in ("none", "allspark"):
        torch.manual_seed(0)
        bottleneck = BottleneckConfig(name=name, skip=name == "allspark")
        model = build_model(ModelConfig(encoder="mit_b0", drop_path=0, dropout=0, bottleneck=bottleneck), 5, 64)
        cross = CrossBatch(2, torch.randn(2, 5, 2, 2)) if name == "allspark" and training else None
        logits[name] = model.train(training)(images, cross=cross).logits
    assert torch.equal(logits["none"], logits["allspark"])
    logits["allspark"].square().mean().backward()
    assert model.bottleneck.map_out.weight.grad.abs().max() > 0
