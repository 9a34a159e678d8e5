"""Tiled inference of large images: equal to the inference of the whole image, with bounded memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from allspark.data.batch import normalize
from allspark.data.spec import DatasetSpec, voc_palette
from allspark.evaluation import tiled as strips
from allspark.evaluation.evaluate import predict, predict_with_confidence
from allspark.evaluation.sliding_window import Inference, class_scores
from allspark.memory_estimate import MemoryCounter
from allspark.models.eval_mode import eval_mode
from allspark.utils.errors import UserError
from allspark.visualization import prediction_writer as outputs
from allspark.visualization.pictures import overlay
from helpers.toy_models import Blurred, Pointwise, image, sliding

CPU = torch.device("cpu")
SPEC = DatasetSpec("five", tuple("abcde"), voc_palette(5))

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(*shape):
    return (image(*shape).sigmoid() * 255).to(torch.uint8)


def in_strips(model, picture, inference):
    """All rows of strip_scores, one below the other."""
    with eval_mode(model):
        found = list(strips.tiled_scores(model, picture, CPU, inference))
    assert [rows.start for rows, _ in found] == list(range(0, picture.shape[-2], strips.ROWS))
    return torch.cat([scores for _, scores in found], 2)


@pytest.mark.parametrize("windows", ["inside", "released"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window_batch", [1, 4, 7])
@pytest.mark.parametrize("shape", [(1, 3, 300, 90), (2, 3, 200, 130), (1, 3, 40, 33), (3, 3, 70, 32), (1, 3, 150, 20)])
def test_strips_are_bit_identical(shape, window_batch, flip, windows):
    """Several windows beside each other, one, a batch over several rows of them, and images smaller than a window."""
    model, picture = Blurred(), pixels(*shape)
    inference = sliding(48, flip=flip, window_batch=window_batch, windows=windows)
    assert torch.equal(in_strips(model, picture, inference), class_scores(model, normalize(picture), inference))


@pytest.mark.parametrize("scales", [(0.5,), (1.37,), (0.75, 1.0, 1.5)])
def test_scales_in_strips(scales):
    model, picture = Blurred(), pixels(1, 3, 210, 150)
    inference = sliding(48, flip=True, scales=scales)
    expected = class_scores(model, normalize(picture), inference)
    torch.testing.assert_close(in_strips(model, picture, inference), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length, to", [(100, 73), (100, 241), (97, 32), (50, 50), (33, 200)])
def test_partial_resize(length, to):
    line = image(1, 1, length, 3)
    whole = F.interpolate(line, (to, 3), mode="bilinear", align_corners=False, antialias=True)[0, 0]
    for first, last in ((0, to), (0, 7), (to // 2, to // 2 + 9), (to - 5, to)):
        start, stop, weights = strips.resize_weights(length, to, first, last)
        assert 0 <= start < stop <= length
        torch.testing.assert_close(weights @ line[0, 0, start:stop], whole[first:last], rtol=1e-4, atol=2e-5)


def test_memory_of_one_strip():
    """Of an image four times as high no more is held; at once it would be four times as much."""
    model, inference = Pointwise(64), sliding(48, flip=True)

    def peak(height):
        picture, ledger = pixels(1, 3, height, 64), MemoryCounter()
        with eval_mode(model), ledger:
            for _ in strips.tiled_scores(model, picture, CPU, inference):
                pass
        return ledger.peak

    assert peak(3000) < 1.1 * peak(750)
    assert peak(3000) < 0.4 * 4 * 64 * 3000 * 64


def test_large_images_use_strips(monkeypatch):
    model, picture = Blurred(), pixels(2, 3, 130, 90)
    arguments = (SPEC, CPU, sliding(48), ["a", "b"])
    label, prob = predict_with_confidence(model, picture, *arguments)
    asked = []
    monkeypatch.setattr(strips, "MAX_SCORES", 1000)
    monkeypatch.setattr(
        "allspark.evaluation.evaluate.tiled_scores", lambda *a: asked.append(1) or strips.tiled_scores(*a)
    )
    large = predict_with_confidence(model.train(), picture, *arguments)
    assert torch.equal(large[0], label) and torch.equal(large[1], prob) and large[0].dtype == torch.uint8
    assert torch.equal(predict(model, picture, *arguments), label)
    assert len(asked) == 2 and model.training
    with pytest.raises(UserError, match="5 classes.*five has 4"):
        predict(model, picture, DatasetSpec("five", tuple("abcd"), voc_palette(4)), *arguments[1:])
    predict(model, picture, SPEC, CPU, Inference(), ["a", "b"])  # as a whole there is no other way
    assert len(asked) == 3


def test_large_pictures_are_drawn_in_bands(monkeypatch):
    rng = np.random.default_rng(0)
    photo = torch.from_numpy(rng.integers(0, 256, (3, 50, 40), np.uint8))
    mask = torch.from_numpy(np.array(Image.fromarray(rng.integers(0, 5, (5, 4), np.uint8)).resize((40, 50), 0)))
    monkeypatch.setattr(outputs, "BAND", 7 * 40)
    np.testing.assert_array_equal(
        outputs.overlay_in_bands(photo, mask, SPEC.palette), overlay(photo, mask, SPEC.palette)
    )
