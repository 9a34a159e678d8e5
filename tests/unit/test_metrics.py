"""The confusion matrix against a loop, and the conventions of the scores."""

import json
import math

import numpy as np
import pytest
import torch

from allspark.evaluation.metrics import ConfusionMatrix, format_table


def random_pair(seed, num_classes, ignore_index, shape=(2, 13, 9)):
    rng = np.random.RandomState(seed)
    prediction, mask = rng.randint(0, num_classes, shape), rng.randint(0, num_classes, shape)
    mask[rng.rand(*shape) < 0.2] = ignore_index
    return torch.from_numpy(prediction).to(torch.uint8), torch.from_numpy(mask).to(torch.uint8)


@pytest.mark.parametrize("num_classes, ignore_index", [(2, 255), (11, 11), (19, 254), (81, 255), (250, 255)])
def test_matrix_equals_loop(num_classes, ignore_index):
    confusion = ConfusionMatrix(num_classes, ignore_index)
    expected = np.zeros((num_classes, num_classes), dtype=np.int64)
    for seed in range(3):
        prediction, mask = random_pair(seed, num_classes, ignore_index)
        confusion.update(prediction, mask.long() if seed == 1 else mask)
        for truth, guess in zip(mask.flatten().tolist(), prediction.flatten().tolist(), strict=True):
            if truth != ignore_index:
                expected[truth, guess] += 1
    assert confusion.matrix.dtype == torch.int64
    np.testing.assert_array_equal(confusion.matrix.numpy(), expected)


def test_scores_equal_intersection_over_union():
    prediction, mask = random_pair(5, 4, 255)
    confusion = ConfusionMatrix(4, 255)
    confusion.update(prediction, mask)
    scores = confusion.result(num_images=2)
    seen = (mask != 255).numpy()
    truth, guess = mask.numpy()[seen], prediction.numpy()[seen]
    iou = [100 * ((truth == k) & (guess == k)).sum() / ((truth == k) | (guess == k)).sum() for k in range(4)]
    np.testing.assert_allclose(scores.iou, iou, rtol=1e-12)
    assert scores.miou == pytest.approx(np.mean(iou))
    assert scores.pixel_accuracy == pytest.approx(100 * (truth == guess).mean())
    assert scores.num_images == 2
    matrix = np.array([[((truth == row) & (guess == column)).sum() for column in range(4)] for row in range(4)])
    np.testing.assert_array_equal(scores.confusion, matrix)
    expected = {
        "dice": 2 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1)),
        "precision": matrix.diagonal() / matrix.sum(0),
        "recall": matrix.diagonal() / matrix.sum(1),
    }
    for metric, values in expected.items():
        np.testing.assert_allclose(scores.per_class()[metric], 100 * values, rtol=1e-12)


def test_absent_class():
    """Class 2 is nowhere; class 1 is predicted but not there, which is a real 0."""
    confusion = ConfusionMatrix(3, 255)
    confusion.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]))
    scores = confusion.result(1)
    assert scores.iou[:2] == (75.0, 0.0) and math.isnan(scores.iou[2])
    assert scores.miou == 37.5
    assert scores.by_class("abc", "precision") == {"a": 100.0, "b": 0.0, "c": None}
    assert scores.by_class("abc", "recall") == {"a": 75.0, "b": 0.0, "c": None}
    released = confusion.result(1, absent_as_zero=True)
    assert released.iou == (75.0, 0.0, 0.0) and released.miou == 25.0


def test_only_ignored_pixels():
    confusion = ConfusionMatrix(3, 255)
    confusion.update(torch.tensor([0, 1]), torch.tensor([255, 255]))
    assert confusion.matrix.sum() == 0
    assert math.isnan(confusion.result(1).miou)


def test_mask_value_without_class_raises():
    with pytest.raises(AssertionError, match="neither a class nor the ignore index"):
        ConfusionMatrix(3, 255).update(torch.tensor([1]), torch.tensor([7]))


def test_table_and_json():
    confusion = ConfusionMatrix(3, 255)
    confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    scores = confusion.result(1)
    classes = ("sky", "traffic light", "boat")
    table = format_table(scores, classes)
    assert len({len(line) for line in table.splitlines()[:-1]}) == 1  # columns line up
    rows = {line.split("  ")[0]: line.split()[-4:] for line in table.splitlines()}
    assert rows["sky"] == ["50.00", "66.67", "100.00", "50.00"] and rows["boat"] == ["-"] * 4
    assert rows["mean of 2 classes"] == ["50.00", "66.67", "75.00", "75.00"]
    assert json.loads(json.dumps(scores.by_class(classes)))["boat"] is None


@pytest.mark.parametrize("absent_as_zero", [False, True])
def test_means_are_over_the_same_classes(absent_as_zero):
    """A class that is only labeled or only predicted has IoU, Dice, precision and recall 0; one in neither has none."""
    confusion = ConfusionMatrix(4, 255)
    confusion.update(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]))
    scores = confusion.result(1, absent_as_zero=absent_as_zero)
    for name, values in scores.per_class().items():
        first = {"iou": 50, "dice": 200 / 3, "precision": 50, "recall": 100}[name]
        np.testing.assert_allclose(values, [first, 0, 0, 0 if absent_as_zero else np.nan])
