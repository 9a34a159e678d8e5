"""UniMatch and UniMatch V2: each step against a literal implementation, channel dropout, edge cases."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from allspark.methods import Progress
from allspark.methods.unimatch import FeatureDropout
from allspark.methods.unimatch_v2 import ComplementaryDropout
from allspark.models.bottleneck import CrossBatch
from allspark.models.student import Student
from allspark.utils.errors import UserError
from helpers.networks import CROP, FIRST, WIDTHS, make_method, make_model, quiet_model, random_batches

THRESHOLD = 0.3  # of an untrained network on 5 classes: some pixels are confident, some are not
CASES = [(name, bottleneck) for name in ("unimatch", "unimatch_v2") for bottleneck in ("none", "allspark")]
STEPS = [("none", 2, True), ("none", 3, True), ("none", 2, False), ("allspark", 2, True)]
steps = pytest.mark.parametrize(("bottleneck", "batch_u", "ignore_padding"), STEPS)


def features_of(model, image, cross=None):
    features = model.encoder(image)
    return features if model.bottleneck is None else [*features[:-1], model.bottleneck(features[-1], cross)]


def decode(model, features):
    return F.interpolate(model.decoder(features), (CROP, CROP), mode="bilinear", align_corners=False)


def paste(x, box, other):
    """Where box is True from the image before, pixel by pixel the same for any number of channels."""
    rows = [torch.where(box[i], other[i - 1], x[i]) for i in range(len(x))]
    return torch.stack(rows)


def loop_loss(logits, prob, other, box, valid):
    """One stream, pixel by pixel: prob labels, inside the box other of the image before -> loss, share of pixels."""
    log_prob, prob, other = (x.detach().double().numpy() for x in (logits.log_softmax(1), prob, other))
    box, valid = box.numpy(), valid.numpy()
    total, count, pixels = 0.0, 0, 0
    for i in range(len(logits)):
        for row in range(CROP):
            for column in range(CROP):
                source, image = (other, i - 1) if box[i, row, column] else (prob, i)
                if not valid[image, row, column]:
                    continue
                pixels += 1
                label = source[image, :, row, column].argmax()
                if source[image, label, row, column] >= THRESHOLD:
                    total -= log_prob[i, label, row, column]
                    count += 1
    assert 0 < count < pixels
    return total / pixels, count / pixels


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name].item() - value) < 2e-5, name


@steps
def test_unimatch_literal(bottleneck, batch_u, ignore_padding):
    """Its whole step: evaluation pass, joint pass with perturbed maps decoded along, strong pass, the sum."""
    method = make_method("unimatch", threshold=THRESHOLD, ignore_padding=ignore_padding)
    labeled, unlabeled = random_batches(method, batch_u=batch_u)
    model = quiet_model(bottleneck)
    torch.manual_seed(5)
    losses = method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)

    model = quiet_model(bottleneck)
    torch.manual_seed(5)
    mask1, _, _, mask4 = FeatureDropout(0.5)([torch.ones(2 + batch_u, width, 1, 1) for width in WIDTHS])
    with torch.no_grad():
        partner = decode(model.eval(), features_of(model, unlabeled.weak))
        model.train()
        both = torch.cat((labeled.image, unlabeled.weak))
        c1, c2, c3, c4 = features_of(model, both, CrossBatch(2, partner, read_memory=True))
        maps = [torch.cat((c1, c1 * mask1)), torch.cat((c2, c2)), torch.cat((c3, c3)), torch.cat((c4, c4 * mask4))]
        clean, perturbed = decode(model, maps).chunk(2)  # batch norm sees both
        perturbed = perturbed[2:]
        boxes = unlabeled.cutmix
        views = [paste(view, box, view) for view, box in zip(unlabeled.strong, boxes, strict=True)]
        strong = decode(model, features_of(model, torch.cat(views), CrossBatch(0)))
    prob, other = clean[2:].softmax(1), partner.softmax(1)
    valid = unlabeled.valid if ignore_padding else torch.ones_like(unlabeled.valid)
    x = F.cross_entropy(clean[:2], labeled.mask).item()
    s1, _ = loop_loss(strong[:batch_u], prob, other, boxes[0], valid)
    s2, _ = loop_loss(strong[batch_u:], prob, other, boxes[1], valid)
    fp, ratio = loop_loss(perturbed, prob, other, torch.zeros_like(boxes[0]), valid)
    total = (x + 0.25 * s1 + 0.25 * s2 + 0.5 * fp) / 2
    expected = {"loss": total, "loss_x": x, "loss_u_s1": s1, "loss_u_s2": s2, "loss_u_fp": fp, "mask_ratio": ratio}
    close(losses, expected)


@steps
def test_unimatch_v2_literal(bottleneck, batch_u, ignore_padding):
    """Its whole step: the teacher labels; the student sees x, and both strong views with half of the channels each."""
    method = make_method("unimatch_v2", threshold=THRESHOLD, ignore_padding=ignore_padding)
    method.attach(quiet_model(bottleneck))
    labeled, unlabeled = random_batches(method, batch_u=batch_u)
    model = quiet_model(bottleneck, seed=3)
    torch.manual_seed(5)
    losses = method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)

    teacher, model = quiet_model(bottleneck).eval(), quiet_model(bottleneck, seed=3)
    torch.manual_seed(5)
    masks = ComplementaryDropout(0.5)([torch.ones(2 * batch_u, width, 1, 1) for width in WIDTHS])
    boxes = unlabeled.cutmix
    with torch.no_grad():
        logits_w = decode(teacher, features_of(teacher, unlabeled.weak))
        views = torch.cat([paste(view, box, view) for view, box in zip(unlabeled.strong, boxes, strict=True)])
        if bottleneck == "none":
            logits_x = decode(model, features_of(model, labeled.image))
            strong = decode(model, [f * m for f, m in zip(features_of(model, views), masks, strict=True)])
        else:
            maps = torch.cat([paste(logits_w, box, logits_w) for box in boxes])
            features = features_of(model, torch.cat((labeled.image, views)), CrossBatch(2, maps, read_memory=True))
            pairs = zip(features, masks, strict=True)
            logits = decode(model, [torch.cat((f[:2], f[2:] * m)) for f, m in pairs])
            logits_x, strong = logits[:2], logits[2:]
    prob = logits_w.softmax(1)
    valid = unlabeled.valid if ignore_padding else torch.ones_like(unlabeled.valid)
    x = F.cross_entropy(logits_x, labeled.mask).item()
    s1, ratio1 = loop_loss(strong[:batch_u], prob, prob, boxes[0], valid)
    s2, ratio2 = loop_loss(strong[batch_u:], prob, prob, boxes[1], valid)
    total, ratio = (x + (s1 + s2) / 2) / 2, (ratio1 + ratio2) / 2
    close(losses, {"loss": total, "loss_x": x, "loss_u_s1": s1, "loss_u_s2": s2, "mask_ratio": ratio})


def test_teacher_ramp():
    """min(1 - 1 / (step + 1), momentum) after each step, of weights and statistics; the teacher is evaluated."""
    student, method = make_model("none"), make_method("unimatch_v2", teacher_momentum=0.6)
    method.attach(student)
    expected = {name: value.clone() for name, value in student.state_dict().items() if value.is_floating_point()}
    for step, keep in enumerate((0, 1 / 2, 0.6, 0.6)):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        method.losses(Student(student), *random_batches(method), FIRST)  # moves the statistics of batch norm
        method.after_step(Student(student), Progress(step, 0, 4))
        for name in expected:
            expected[name] = keep * expected[name] + (1 - keep) * student.state_dict()[name]
    assert method.predictor(student) is method.teacher.model
    found = method.predictor(student).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# Channel dropout


def test_feature_dropout():
    """Whole channels of the finest and the deepest map, each image its own, scaled to keep the mean."""
    torch.manual_seed(0)
    features = [torch.rand(100, width, 3, 3) + 1 for width in (64, 8, 8, 96)]
    found = FeatureDropout(0.25)(features)
    assert found[1] is features[1] and found[2] is features[2]
    for before, after in ((features[0], found[0]), (features[3], found[3])):
        mask = (after / before)[:, :, 0, 0]
        torch.testing.assert_close(after, before * mask[..., None, None])
        assert torch.allclose(mask[mask > 0], torch.tensor(4 / 3))
        assert abs((mask == 0).float().mean() - 0.25) < 0.03  # 6400 draws or more: 5 standard deviations
        assert len(mask.unique(dim=0)) == 100
    assert all(torch.equal(a, b) for a, b in zip(FeatureDropout(0.0)(features), features, strict=True))


@pytest.mark.parametrize(("batch", "untouched"), [(1, 0), (2, 1), (5, 2), (40, 20)])
def test_complementary_dropout(batch, untouched):
    """What one view loses the other has, twice; half of the images and all labeled ones stay as they are."""
    torch.manual_seed(0)
    views = [torch.rand(batch, width, 3, 3) + 1 for width in (48, 64, 80, 96)]
    features = [torch.cat((torch.rand(3, *view.shape[1:]), view, view)) for view in views]
    found = ComplementaryDropout()(features, num_labeled=3)
    masks = []
    for before, after in zip(features, found, strict=True):
        assert torch.equal(after[:3], before[:3])
        first, second = after[3 : 3 + batch], after[3 + batch :]
        assert torch.equal(first + second, 2 * before[3 : 3 + batch])
        mask = (first / before[3 : 3 + batch])[:, :, 0, 0]
        torch.testing.assert_close(first, before[3 : 3 + batch] * mask[..., None, None])
        masks.append(mask.round())
    same = [(mask == 1).all(1) for mask in masks]
    assert all(torch.equal(kept, same[0]) for kept in same) and same[0].sum() == untouched
    for mask in masks:
        assert set(mask[~same[0]].unique().tolist()) == {0.0, 2.0}
        assert len(mask[~same[0]].unique(dim=0)) == batch - untouched  # each image its own
    assert not torch.equal(masks[0][~same[0]], masks[1][~same[0], :48])  # each map its own


def test_layers_of_a_vit_share_the_dropout_mask():
    features = [torch.rand(10, 16, 2, 2) + 1 for _ in range(4)]
    masks = [after / before for before, after in zip(features, ComplementaryDropout()(features), strict=True)]
    assert all(torch.equal(mask.round(), masks[0].round()) for mask in masks) and (masks[0].round() == 0).any()


def test_complementary_dropout_is_uniform():
    """Over many draws each channel is kept half of the time, and each image is left alone half of the time."""
    torch.manual_seed(0)
    ones = torch.ones(8, 20, 1, 1)  # both views of 4 images
    draws = torch.stack([ComplementaryDropout()([ones])[0][:4, :, 0, 0] for _ in range(1000)])
    assert ((draws == 1).all(2).float().mean(0) - 0.5).abs().max() < 0.08  # 5 standard deviations
    assert ((draws == 2).float().mean((0, 1)) - 0.25).abs().max() < 0.04
    assert ((draws == 0).float().mean((0, 1)) - 0.25).abs().max() < 0.04


def test_no_share_no_dropout():
    features = [torch.rand(6, 4, 2, 2)]
    assert torch.equal(ComplementaryDropout(0.0)(features)[0], features[0])
    found = ComplementaryDropout(1.0)(features)[0]
    assert not (found / features[0] == 1).any()


# Batches at the edge


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
@pytest.mark.parametrize("what", ["padding", "nothing confident", "nothing labeled"])
def test_empty_streams(name, bottleneck, what):
    """Such a stream is 0, not NaN, and so are its gradients; the denominator of the others does not change."""
    model, method = make_model(bottleneck), make_method(name, threshold=1.0 if what == "nothing confident" else 0.0)
    method.attach(model)
    labeled, unlabeled = random_batches(method)
    if what == "padding":
        unlabeled = replace(unlabeled, valid=torch.zeros_like(unlabeled.valid))
    if what == "nothing labeled":
        labeled = replace(labeled, mask=torch.full_like(labeled.mask, 255))
    losses = method.losses(Student(model), labeled, unlabeled, FIRST)
    losses["loss"].backward()
    streams = [value.item() for key, value in losses.items() if key.startswith("loss_u_")]
    if what == "nothing labeled":
        assert losses["loss_x"].item() == 0 and all(value > 0 for value in streams)
    else:
        assert set(streams) == {0.0} and losses["mask_ratio"].item() == 0
        torch.testing.assert_close(losses["loss"], losses["loss_x"] / 2)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_single_image_is_not_mixed(name, bottleneck):
    found = []
    for filled in (True, False):
        model, method = make_model(bottleneck), make_method(name, threshold=THRESHOLD)
        method.attach(model)
        labeled, unlabeled = random_batches(method, batch_x=1, batch_u=1)
        boxes = tuple(torch.full_like(box, filled) for box in unlabeled.cutmix)
        torch.manual_seed(0)
        found.append(method.losses(Student(model), labeled, replace(unlabeled, cutmix=boxes), FIRST))
    assert all(torch.isfinite(value) for value in found[0].values()) and found[0]["mask_ratio"] > 0
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key])


def test_views_have_own_boxes():
    """A box in view 1 does not move view 2, and the perturbed stream is never pasted."""
    whole = torch.ones(2, CROP, CROP, dtype=torch.bool)
    for name, kept in (("unimatch", {"loss_x", "loss_u_fp"}), ("unimatch_v2", {"loss_x"})):
        model, method = quiet_model("none"), make_method(name, threshold=0.0)
        method.attach(model)
        labeled, unlabeled = random_batches(method)
        results = []
        for boxes in ((~whole, ~whole), (whole, ~whole)):
            torch.manual_seed(0)
            student = copy.deepcopy(model)
            results.append(method.losses(Student(student), labeled, replace(unlabeled, cutmix=boxes), FIRST))
        changed = {key for key in results[0] if not torch.allclose(results[0][key], results[1][key], rtol=1e-6)}
        assert "loss_u_s1" in changed and not changed & kept, name


# Options


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("unimatch", {"threshold": 95.0}, "threshold=95"),
        ("unimatch", {"cutmix": 2.0}, "cutmix=2"),
        ("unimatch", {"feature_dropout": 1.0}, "feature_dropout=1.0.*below 1"),
        ("unimatch_v2", {"threshold": -0.1}, "threshold=-0.1"),
        ("unimatch_v2", {"feature_dropout": 1.5}, "feature_dropout=1.5.*0..1"),
        ("unimatch_v2", {"teacher_momentum": 1.0}, "teacher_momentum=1.0.*below 1"),
    ],
)
def test_bad_options(name, options, words):
    with pytest.raises(UserError, match=f"method.{words}"):
        make_method(name, **options)
