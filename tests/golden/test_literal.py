"""The losses of FixMatch and of the revised AllSpark, against loops over images and pixels."""

import pytest
import torch
import torch.nn.functional as F

from allspark.build import complete
from allspark.config_io import load_recipe
from allspark.models.bottleneck import CrossBatch
from allspark.models.student import Student
from helpers.networks import CLASSES, FIRST, make_method, make_model, quiet_model, random_batches


def test_fixmatch_literal():
    """Label of the train-mode weak pass, pasted region of the evaluation pass over the partner, denominator = valid."""
    model = make_model("none", dropout=0.0, drop_path=0.0)
    method = make_method("fixmatch", threshold=0.3)
    labeled, unlabeled = random_batches(method)
    box, valid = unlabeled.cutmix[0], unlabeled.valid
    losses = method.losses(Student(model), labeled, unlabeled, FIRST)

    model = make_model("none", dropout=0.0, drop_path=0.0)
    with torch.no_grad():
        partner = model.eval()(unlabeled.weak).logits.softmax(1)
    model.train()
    prob = model(torch.cat((labeled.image, unlabeled.weak))).logits[2:].softmax(1)
    total, count, pixels = 0.0, 0, 0
    mixed = unlabeled.strong[0].clone()
    for i in range(2):
        mixed[i][:, box[i]] = unlabeled.strong[0][i - 1][:, box[i]]
    loss = model(mixed).logits.log_softmax(1)
    for i in range(2):
        p = torch.where(box[i], partner[i - 1], prob[i])
        ok = torch.where(box[i], valid[i - 1], valid[i])
        confidence, label = p.max(0)
        keep = (confidence >= 0.3) & ok
        total -= (loss[i].gather(0, label[None])[0] * keep).sum().item()
        count, pixels = count + keep.sum().item(), pixels + ok.sum().item()
    assert abs(losses["loss_u"].item() - total / pixels) < 1e-5
    assert abs(losses["mask_ratio"].item() - count / pixels) < 1e-6


def literal_thresholds(prob, valid, common):
    """Of each class the highest n / 200 that as large a share of its pixels has as has the common one of all pixels."""
    confidence, label = (values[valid] for values in prob.max(1))
    share, found = (confidence >= common).double().mean().item(), []
    for k in range(CLASSES):
        own = confidence[label == k]
        kept = [n / 200 for n in range(200) if len(own) and (own >= n / 200).sum().item() >= share * len(own)]
        found.append(min(max(kept, default=1.0), common))
    return torch.tensor(found)


@pytest.mark.parametrize("class_wise", [False, True])
@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
def test_allspark_revised_literal(bottleneck, class_wise):
    """Labels of the teacher, pasted with their confidence and their padding; denominator = valid; (x + u) / 2."""
    given = {"threshold": 0.3, "class_thresholds": class_wise}
    recipe = complete(load_recipe("shapes", "allspark_revised", {f"method.{key}": given[key] for key in given}))
    method = make_method("allspark", **recipe.method.options)
    method.attach(quiet_model(bottleneck))
    labeled, unlabeled = random_batches(method, 2, 3)
    losses = method.losses(Student(quiet_model(bottleneck, seed=3), read_memory=True), labeled, unlabeled, FIRST)

    box, valid = unlabeled.cutmix[0], unlabeled.valid
    with torch.no_grad():
        taught = quiet_model(bottleneck).eval()(unlabeled.weak).logits
        mixed = [torch.where(box[i], unlabeled.strong[0][i - 1], unlabeled.strong[0][i]) for i in range(3)]
        pasted = torch.stack([torch.where(box[i], taught[i - 1], taught[i]) for i in range(3)])
        cross = None if bottleneck == "none" else CrossBatch(2, pasted, read_memory=True)
        logits = quiet_model(bottleneck, seed=3)(torch.cat((labeled.image, torch.stack(mixed))), cross=cross).logits
    least = literal_thresholds(taught.softmax(1), valid, 0.3) if class_wise else torch.full((CLASSES,), 0.3)
    assert (least.min() < 0.3) == class_wise
    total, count, pixels = 0.0, 0, 0
    for i in range(3):
        confidence, label = pasted[i].softmax(0).max(0)
        ok = torch.where(box[i], valid[i - 1], valid[i])
        keep = (confidence >= least[label]) & ok
        total -= (logits[2 + i].log_softmax(0).gather(0, label[None])[0] * keep).sum().item()
        count, pixels = count + keep.sum().item(), pixels + ok.sum().item()
    assert 0 < count < pixels
    assert abs(losses["loss_u"].item() - total / pixels) < 1e-5
    assert abs(losses["mask_ratio"].item() - count / pixels) < 1e-6
    torch.testing.assert_close(losses["loss_x"], F.cross_entropy(logits[:2], labeled.mask))
    torch.testing.assert_close(losses["loss"], (losses["loss_x"] + losses["loss_u"]) / 2)
