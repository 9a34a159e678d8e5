"""Sliding windows, scales and flips on small models with a known result."""

import pytest
import torch

from allspark.evaluation.sliding_window import (
    Inference,
    average_views,
    best_class,
    check_size,
    class_scores,
    predict_sliding,
    window_spans,
)
from allspark.utils.errors import UserError
from helpers.toy_models import Blurred, Pointwise, image, sliding


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 100, 1024, 2048])
@pytest.mark.parametrize("window", [32, 48, 64, 801])
def test_windows_cover_the_side(length, window):
    for spans in (window_spans(length, window), window_spans(length, window, "released")):
        seen = [0] * length
        for start, end in spans:
            assert 0 <= start < end <= length
            for position in range(start, end):
                seen[position] += 1
        assert min(seen) >= 1 and len(set(spans)) == len(spans)
    assert all(end - start == min(window, length) for start, end in window_spans(length, window))


def test_cityscapes_windows():
    """As many as the released code has, the last of each side shifted inside instead of cut off."""
    assert window_spans(1024, 801) == [(0, 801), (223, 1024)]
    assert window_spans(2048, 801) == [(0, 801), (534, 1335), (1068, 1869), (1247, 2048)]
    assert window_spans(1024, 801, "released") == [(0, 801), (534, 1024)]
    assert window_spans(2048, 801, "released") == [(0, 801), (534, 1335), (1068, 1869), (1602, 2048)]


@pytest.mark.parametrize("size", [(20, 17), (48, 48), (49, 47), (47, 130), (100, 131)])
@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_pointwise_model_is_unchanged_by_sliding(size, num_classes):
    model = Pointwise(num_classes)
    picture = image(2, 3, *size)
    scores = class_scores(model, picture, sliding(48))
    assert scores.shape == (2, num_classes, *size)
    expected = model.conv(picture).softmax(1)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_one_window_is_whole_image():
    model = Blurred()
    picture = image(1, 3, 60, 40)
    whole = class_scores(model, picture, Inference()).softmax(1)
    for window in (60, 61, 200):
        torch.testing.assert_close(class_scores(model, picture, sliding(window)), whole)


def test_sliding_is_mean_over_windows():
    """Against the windows taken one by one, with a model that sees the border of its window."""
    model, picture = Blurred().eval(), image(1, 3, 50, 70)
    total, seen = torch.zeros(1, 5, 50, 70), torch.zeros(50, 70)
    with torch.no_grad():
        for y in (0, 18):
            for x in (0, 21, 38):
                total[..., y : y + 32, x : x + 32] += model(picture[..., y : y + 32, x : x + 32]).logits.softmax(1)
                seen[y : y + 32, x : x + 32] += 1
    torch.testing.assert_close(class_scores(model, picture, sliding(32)), total / seen)


@pytest.mark.parametrize("size", [(80, 100), (40, 50), (64, 64), (33, 75)])
def test_released_windows_literal(size):
    """The two loops of the released code: sums of probabilities, windows cut off at the border."""
    model, picture, (height, width) = Blurred().eval(), image(2, 3, *size), size
    total, seen, row = torch.zeros(2, 5, height, width), torch.zeros(height, width), 0
    with torch.no_grad():
        while row < height:
            column = 0
            while column < width:
                part = (..., slice(row, row + 48), slice(column, column + 48))
                total[part] += model(picture[part]).logits.softmax(1)
                seen[part] += 1
                column += 32
            row += 32
    scores = class_scores(model, picture, sliding(48, windows="released"))
    torch.testing.assert_close(scores, total / seen)  # a mean has the same best class as a sum
    assert not torch.allclose(scores, class_scores(model, picture, sliding(48)))


def test_tiny_released_window():
    picture = image(1, 3, 64, 75)
    check_size(picture, "a.png", sliding(48))
    check_size(picture[..., :64], "a.png", sliding(48, windows="released", scales=(1.0, 2.0)))
    with pytest.raises(UserError, match="a.png: .*a side of 11 pixels; .* at least 32; use inside"):
        check_size(picture, "a.png", sliding(48, windows="released"))


def test_equal_window_batches():
    model = Pointwise().eval()
    with torch.no_grad():
        predict_sliding(model, image(1, 3, 64, 80), sliding(32, window_batch=4))
    assert model.sizes == [(4, 3, 32, 32), (4, 3, 32, 32), (4, 3, 32, 32)]


def test_image_narrower_than_window():
    model = Pointwise()
    class_scores(model, image(1, 3, 40, 100), sliding(48))
    assert {size[-2:] for size in model.sizes} == {(40, 48)}


@pytest.mark.parametrize("inference", [Inference(flip=True), sliding(32, flip=True)])
def test_flip_of_pointwise_model(inference):
    model, picture = Pointwise(), image(2, 3, 40, 50)
    expected = model.conv(picture).softmax(1)
    torch.testing.assert_close(class_scores(model, picture, inference), expected)


@pytest.mark.parametrize("inference", [Inference(flip=True, scales=(0.75, 1.0, 1.5)), sliding(37, flip=True)])
def test_flipped_image_gives_flipped_scores(inference):
    """One window here: the layout of several is not symmetric, so there flipping is an average and no symmetry."""
    model, picture = Blurred(), image(1, 3, 37, 37)
    straight = class_scores(model, picture, inference)
    mirrored = class_scores(model, picture.flip(-1), inference)
    torch.testing.assert_close(mirrored.flip(-1), straight, rtol=1e-4, atol=1e-5)


def test_scales_of_flat_image():
    """Where every pixel has one color, no scale can move anything."""
    model = Pointwise()
    picture = image(2, 3, 1, 1).expand(2, 3, 45, 70).contiguous()
    scores = class_scores(model, picture, Inference(scales=(0.5, 0.75, 1.0, 1.25), flip=True))
    assert [size[-2:] for size in model.sizes] == [(32, 35)] * 2 + [(34, 52)] * 2 + [(45, 70)] * 2 + [(56, 88)] * 2
    torch.testing.assert_close(scores, model.conv(picture).softmax(1))


@pytest.mark.parametrize("inference", [Inference(), sliding(32), Inference(scales=(0.75, 1.0), flip=True)])
def test_independent_of_batch_mates(inference):
    model = Blurred()
    pictures = image(3, 3, 50, 41)
    together = class_scores(model, pictures, inference)
    alone = torch.cat([class_scores(model, picture[None], inference) for picture in pictures])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_training_flags_are_restored():
    model = Blurred().train()
    model.conv[1].eval()  # a frozen batch norm
    before = [module.training for module in model.modules()]
    class_scores(model, image(1, 3, 40, 40), Inference(flip=True))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError):
        class_scores(model, image(1, 4, 40, 40), Inference())  # four channels
    assert [module.training for module in model.modules()] == before


def test_prob_matches_logits():
    model, picture = Pointwise(), image(2, 3, 40, 40)
    prob = average_views(model, picture, Inference())
    torch.testing.assert_close(prob.sum(1), torch.ones(2, 40, 40))
    assert torch.equal(prob.max(1)[1], class_scores(model, picture, Inference()).max(1)[1])


@pytest.mark.parametrize("inference", [Inference(), sliding(32), Inference(flip=True), Inference(scales=(1.0, 1.5))])
def test_best_class_and_probability(inference):
    model, picture = Blurred(), image(2, 3, 40, 40)
    label, prob = best_class(class_scores(model, picture, inference), inference)
    expected = average_views(model, picture, inference).max(1)
    assert torch.equal(label, expected.indices)
    torch.testing.assert_close(prob, expected.values)


def test_center_crop_region():
    assert Inference("center_crop", 33).region(40, 100) == (slice(3, 36), slice(33, 66))
    assert Inference("center_crop", 64).region(40, 100) == (slice(0, 40), slice(18, 82))
    assert Inference().region(40, 100) == (slice(0, 40), slice(0, 100))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"mode": "tiles"}, "tiles.*sliding_window"),
        ({"mode": "sliding_window"}, "window None"),
        ({"mode": "center_crop", "window": 16}, "16.*at least 32"),
        ({"windows": "tiles"}, "tiles.*inside, released"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, -0.5)}, "-0.5"),
    ],
)
def test_impossible_settings(options, told):
    with pytest.raises(UserError, match=told):
        Inference(**options)
