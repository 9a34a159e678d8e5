"""PseudoSeg: every formula against literal loops or autograd, the whole step, edge cases of batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from allspark.build import build_method, complete
from allspark.config import ModelConfig
from allspark.config_io import load_recipe
from allspark.data.batch import LabeledBatch
from allspark.data.datasets import spec_for
from allspark.data.transforms import PHOTOMETRIC
from allspark.losses import CrossEntropy, consistency_loss
from allspark.methods.pseudoseg import PseudoSeg, cut_out, fuse
from allspark.methods.pseudoseg_cam import ImageClassifier, SelfAttentionCAM, present_classes
from allspark.models.bottleneck import CrossBatch
from allspark.models.segmentor import build_model
from allspark.models.student import Student
from allspark.utils.errors import UserError
from helpers.networks import CLASSES, CROP, FIRST, make_model, quiet_model, random_batches

BOTTLENECKS = pytest.mark.parametrize("bottleneck", ["none", "allspark"])
BACKGROUNDS = pytest.mark.parametrize("background", [None, 0, 2])


def attached(model, background=0, seed=4, **options):
    """A method whose heads see some classes and not others; the same for the same seed."""
    method = PseudoSeg(CrossEntropy(), background, **options)
    torch.manual_seed(seed)
    method.attach(model)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
        model.heads["sgc"].norm.running_mean.normal_()
        model.heads["sgc"].norm.running_var.uniform_(0.5, 2)
    return method


@BACKGROUNDS
def test_present_classes(background):
    mask = torch.randint(0, CLASSES, (4, 6, 7), generator=torch.Generator().manual_seed(0)).clamp(max=3)
    mask[0], mask[1], mask[2, :3] = 255, 2, 255
    labels = [label for label in range(CLASSES) if label != background]
    expected = [[float((one == label).any()) for label in labels] for one in mask]
    assert present_classes(mask, CLASSES, background).tolist() == expected


def test_grad_cam_equals_autograd():
    """Weights from the gradient of each logit, as the paper defines it; here they are the classifier's own."""
    torch.manual_seed(0)
    classifier, feature = ImageClassifier(6, 4), torch.randn(3, 6, 5, 4, requires_grad=True)
    present = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    cam = classifier.grad_cam(feature, present)
    assert not cam.requires_grad
    logits = classifier(feature)
    for image in range(3):
        for label in range(4):
            (gradient,) = torch.autograd.grad(logits[image, label], feature, retain_graph=True)
            weights = gradient[image].mean((1, 2))  # one per channel
            expected = (weights[:, None, None] * feature[image]).sum(0).relu() * present[image, label]
            if expected.max() > 0:
                expected = expected / expected.max()
            torch.testing.assert_close(cam[image, label], expected.detach(), atol=1e-6, rtol=1e-5)
    assert cam[2].amax((1, 2)).eq(1).all() and cam[1].eq(0).all()


def sgc_loops(sgc, features, cam, valid):
    """Hypercolumn, attention with masked keys, skip, background score, projection, batch norm: (B, K, h, w) float64."""
    (height, width), (crop, _) = cam.shape[-2:], valid.shape[-2:]
    last = F.interpolate(features[0], (height, width), mode="bilinear")
    column = torch.cat((last, features[1]), 1).double().numpy()
    query, key = (layer.weight.detach()[..., 0, 0].double().numpy() for layer in (sgc.q, sgc.k))
    project = sgc.classifier.weight.detach()[..., 0, 0].double().numpy()
    places = [(row, column) for row in range(height) for column in range(width)]
    cell = crop // height
    out = np.zeros((len(cam), len(project), height, width))
    for image in range(len(cam)):
        seen = [valid[image, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].any().item() for y, x in places]
        seen = seen if any(seen) else [True] * len(places)
        uniform = not any(valid[image].flatten().tolist())
        maps = cam[image].double().numpy()
        for y, x in places:
            q = query @ column[image][:, y, x]
            similar = np.array([q @ (key @ column[image][:, v, u]) / np.sqrt(128) for v, u in places])
            weight = np.where(seen, np.exp(0 * similar if uniform else similar - similar.max()), 0)
            weight = weight / weight.sum()
            score = maps[:, y, x] + sum(w * maps[:, v, u] for w, (v, u) in zip(weight, places, strict=True))
            assert 0 <= score.min() and score.max() <= 2 + 1e-6
            if sgc.background:
                score = np.concatenate(([2 - score.max()], score))
            out[image, :, y, x] = project @ score
    return out


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_equals_loops(background, training):
    torch.manual_seed(0)
    sgc = SelfAttentionCAM((3, 6), 4, background).train(training)
    sgc.norm.running_mean.normal_(), sgc.norm.running_var.uniform_(0.5, 2)
    sgc.norm.weight.data.uniform_(0.5, 2), sgc.norm.bias.data.normal_()
    mean, var = sgc.norm.running_mean.double().numpy(), sgc.norm.running_var.double().numpy()
    features = [torch.randn(3, 3, 8, 8), torch.randn(3, 6, 4, 4)]
    cam, valid = torch.rand(3, 4 - background, 4, 4), torch.zeros(3, 16, 16, dtype=torch.bool)
    valid[0, :9, :6] = True  # image 0: cells of 4 px, the third row and the second column are seen in part
    valid[1] = True  # image 2 is all padding
    expected = sgc_loops(sgc, features, cam, valid)
    if training:
        mean, var = expected.mean((0, 2, 3)), expected.var((0, 2, 3))
    scale, shift = (p.detach().double().numpy()[:, None, None] for p in (sgc.norm.weight, sgc.norm.bias))
    expected = (expected - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5) * scale + shift
    expected = F.interpolate(torch.from_numpy(expected).float(), (16, 16), mode="bilinear")
    torch.testing.assert_close(sgc(features, cam, valid), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("align_corners", [False, True])
def test_encoder_padding_is_cropped(align_corners):
    """Cells of 8 pixels that cover an image of 27 x 21 as one of 32 x 24, of which the rest is padding."""
    torch.manual_seed(0)
    sgc = SelfAttentionCAM((3, 6), 4, True, multiple=8, align_corners=align_corners).eval()
    features, cam = [torch.randn(2, 3, 4, 3), torch.randn(2, 6, 4, 3)], torch.rand(2, 3, 4, 3)
    valid = torch.zeros(2, 32, 24, dtype=torch.bool)
    valid[0, :27, :16], valid[1, 24:27, :21] = True, True
    whole = SelfAttentionCAM((3, 6), 4, True, align_corners=align_corners).eval()
    whole.load_state_dict(sgc.state_dict())
    expected = whole(features, cam, valid)[..., :27, :21]
    torch.testing.assert_close(sgc(features, cam, valid[:, :27, :21]), expected)


@pytest.mark.parametrize(("name", "decoder_name"), [("timm:test_convnext", "mlp"), ("resnet50", "deeplab")])
def test_maps_align_with_decoder(name, decoder_name):
    """A network that draws one cell of the deepest map: decoder and SGC draw it in the same place."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder=name, decoder=decoder_name), 3, 75)
    PseudoSeg(CrossEntropy(), 0).attach(model)
    sgc, side = model.heads["sgc"].eval(), -(-75 // model.encoder.strides[-1])
    with torch.no_grad():
        sgc.classifier.weight.copy_(torch.eye(3)[..., None, None])
        sgc.k.weight.zero_()  # all cells weigh the same
    features = [torch.zeros(1, channels, side, side) for channels in model.encoder.channels[-2:]]
    cell = torch.zeros(1, 2, side, side)
    cell[0, 1, 1, side - 1] = 1
    drawn = sgc(features, cell, torch.ones(1, 75, 75, dtype=torch.bool))[0, 2]
    model.decoder.forward = lambda maps: maps[-1]
    expected = model.decode([cell], (75, 75))[0, 1]
    for one in (drawn, expected):
        one -= one.min()
    torch.testing.assert_close(drawn / drawn.max(), expected / expected.max(), atol=1e-4, rtol=1e-4)


def test_padding_does_not_leak():
    torch.manual_seed(0)
    sgc = SelfAttentionCAM((3, 6), 4, True).eval()
    features, cam = [torch.randn(1, 3, 4, 4), torch.randn(1, 6, 4, 4)], torch.rand(1, 3, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[..., 3] = False
    others = [feature.clone() for feature in features], cam.clone()
    for x in (*others[0], others[1]):
        x[..., 3] = torch.rand_like(x[..., 3])
    seen, changed = sgc(features, cam, valid), sgc(*others, valid)
    torch.testing.assert_close(seen[..., :3], changed[..., :3])
    assert not torch.allclose(seen[..., :3], sgc(*others, valid | True)[..., :3])


@pytest.mark.parametrize(("gamma", "temperature"), [(0.5, 0.5), (0.8, 1.0), (0.5, 0.1), (1.0, 0.01)])
def test_fusion_equals_loops(gamma, temperature):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 4, 5, generator=generator) * size for size in (9.0, 0.1))
    fused = fuse(first, second, gamma, temperature)
    for image in range(2):
        a, b = first[image].double().numpy(), second[image].double().numpy()
        rms = np.sqrt((sum(v * v for v in a.flat) + sum(v * v for v in b.flat)) / (2 * a.size) + 1e-8)
        for y in range(4):
            for x in range(5):
                p, q = (np.exp(v[:, y, x] / rms) / np.exp(v[:, y, x] / rms).sum() for v in (a, b))
                mean = gamma * p + (1 - gamma) * q
                sharp = mean ** (1 / temperature) / (mean ** (1 / temperature)).sum()
                np.testing.assert_allclose(fused[image, :, y, x].numpy(), sharp, atol=1e-5)


def test_fusion_is_independent_of_batch():
    torch.manual_seed(0)
    first, second = (torch.randn(3, 4, 6, 6) * torch.tensor([0.1, 1, 50]).view(3, 1, 1, 1) for _ in range(2))
    together = fuse(first, second, 0.5, 0.5)
    alone = torch.cat([fuse(a[None], b[None], 0.5, 0.5) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(together, alone)
    nothing = torch.zeros(1, 4, 6, 6)
    torch.testing.assert_close(fuse(nothing, nothing, 0.5, 0.5), nothing + 0.25)


@pytest.mark.parametrize(("crop", "half"), [(513, 50), (97, 9), (65, 6)])
def test_cut_out_is_one_clipped_square(crop, half):
    torch.manual_seed(0)
    image = torch.rand(40, 3, crop, crop) + 1
    cut, hole = cut_out(image)
    whole = 0
    for one in range(40):
        rows, columns = (hole[one].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        assert hole[one].sum() == len(rows) * len(columns)
        for side in (rows, columns):
            assert side == list(range(side[0], side[-1] + 1)) and half <= len(side) <= 2 * half
            assert len(side) == 2 * half or side[0] == 0 or side[-1] == crop - 1
        whole += len(rows) == len(columns) == 2 * half
    assert whole > 10
    assert torch.equal(cut, image * ~hole[:, None])


def test_cut_out_position():
    """The center is any pixel alike: half of the centers lie in each half of the crop, for rows and columns apart."""
    torch.manual_seed(0)
    _, hole = cut_out(torch.ones(4000, 1, 20, 20))  # half-size 2
    for axis in (2, 1):
        first = hole.any(axis).float().argmax(1)
        count = torch.bincount(first, minlength=19) / 4000
        assert (count[0] - 3 / 20).abs() < 0.025  # centers 0, 1 and 2 begin there
        assert (count[1:18] - 1 / 20).abs().max() < 0.015
    center = torch.stack([hole.any(axis).float().argmax(1) for axis in (2, 1)]).float()
    assert torch.corrcoef(center)[0, 1].abs() < 0.06


def test_soft_label_loss():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).softmax(1)
    valid = torch.rand(2, 4, 5) < 0.6
    loss, _ = consistency_loss(logits, target, None, valid)
    log_prob, total, pixels = logits.double().log_softmax(1).numpy(), 0.0, 0
    for i in range(2):
        for y in range(4):
            for x in range(5):
                if valid[i, y, x]:
                    pixels += 1
                    total -= sum(float(target[i, k, y, x]) * log_prob[i, k, y, x] for k in range(3))
    assert abs(loss.item() - total / pixels) < 1e-6
    everywhere, _ = consistency_loss(logits, target)
    torch.testing.assert_close(everywhere, consistency_loss(logits, target, None, valid | True)[0])
    assert consistency_loss(logits, target, None, valid & False)[0] == 0


@BOTTLENECKS
@BACKGROUNDS
def test_step_literal(bottleneck, background):
    """Its whole step: evaluation pass of the weak view, labeled images, strong view, four losses of weight 1."""
    model = quiet_model(bottleneck)
    method = attached(model, background)
    labeled, unlabeled = random_batches(method)
    labeled.mask[0, :40], labeled.mask[1] = 255, labeled.mask[1].clamp(min=1, max=3)
    torch.manual_seed(5)
    losses = method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)

    model = quiet_model(bottleneck)
    attached(model, background)
    classifier, sgc = model.heads["classifier"], model.heads["sgc"]
    on = bottleneck == "allspark"
    with torch.no_grad():
        model.eval()
        weak = model(unlabeled.weak)
        present = (classifier(weak.features[3]).sigmoid() >= 0.5).float()
        assert 0 < present.sum() < present.numel()
        cam = classifier.grad_cam(weak.features[3], present)
        torch.manual_seed(5)
        strong, hole = cut_out(unlabeled.strong[0])
        keep = unlabeled.valid & ~hole
        target = fuse(weak.logits, sgc(weak.features[2:], cam, keep), 0.5, 0.5)
        model.train()
        if on:
            out = model(torch.cat((labeled.image, strong)), cross=CrossBatch(2, weak.logits, read_memory=True))
            (logits_x, logits_u), features = out.logits.split(2), [feature[:2] for feature in out.features[2:]]
        else:
            out, logits_u = model(labeled.image), model(strong).logits
            logits_x, features = out.logits, out.features[2:]
        names = [k for k in range(CLASSES) if k != background]
        truth = torch.tensor([[float((mask == k).any()) for k in names] for mask in labeled.mask])
        sgc_logits = sgc(features, classifier.grad_cam(features[1], truth), labeled.mask != 255)
        prob = classifier(features[1]).sigmoid()
    assert 0 < (unlabeled.valid & hole).sum() and 0 < keep.sum()
    each = -(target * logits_u.log_softmax(1)).sum(1)
    expected = {
        "loss_x": F.cross_entropy(logits_x, labeled.mask, ignore_index=255),
        "loss_sgc": F.cross_entropy(sgc_logits, labeled.mask, ignore_index=255),
        "loss_cls": -(truth * prob.log() + (1 - truth) * (1 - prob).log()).mean(),
        "loss_u": each[keep].sum() / keep.sum(),
    }
    expected["loss"] = sum(expected.values())
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(losses[name].item() - value.item()) < 2e-5, name


@BOTTLENECKS
def test_soft_label_is_independent_of_batch(bottleneck):
    """And making it changes no buffer, leaves the mode as it was, and carries no gradient."""
    model = make_model(bottleneck)
    method = attached(model)
    _, unlabeled = random_batches(method, batch_u=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, together = method.soft_labels(Student(model), unlabeled.weak, unlabeled.valid)
    assert model.training and model.heads["sgc"].norm.training and not together.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(together.sum(1), torch.ones(3, CROP, CROP))
    for i in range(3):
        one = replace(unlabeled, weak=unlabeled.weak[i : i + 1], valid=unlabeled.valid[i : i + 1])
        _, alone = method.soft_labels(Student(model), one.weak, one.valid)
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=1e-4)


@BOTTLENECKS
def test_gradients_of_each_loss(bottleneck):
    """SGC trains itself alone, the image classifier the encoder, too; the losses of the decoder reach no head."""
    model = make_model(bottleneck)
    method = attached(model)
    losses = method.losses(Student(model), *random_batches(method), FIRST)
    parameters = dict(model.named_parameters())

    def reached(name):
        gradients = torch.autograd.grad(losses[name], parameters.values(), retain_graph=True, allow_unused=True)
        found = {key for key, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().sum() > 0}
        return {".".join(key.split(".")[:2]) if key.startswith("heads") else key.split(".")[0] for key in found}

    between = {"bottleneck"} if bottleneck == "allspark" else set()
    assert reached("loss_sgc") == {"heads.sgc"}
    assert reached("loss_cls") == {"heads.classifier", "encoder"} | between
    assert reached("loss_x") == reached("loss_u") == {"encoder", "decoder"} | between


@BOTTLENECKS
def test_supervised_losses_reach_every_parameter(bottleneck):
    model = make_model(bottleneck)
    method = attached(model)
    labeled, _ = random_batches(method)
    losses = method.supervised_losses(Student(model), labeled)
    losses["loss"].backward()
    torch.testing.assert_close(losses["loss"], losses["loss_x"] + losses["loss_sgc"] + losses["loss_cls"])
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@BOTTLENECKS
@pytest.mark.parametrize(("batch_x", "batch_u"), [(1, 1), (2, 3)])
def test_edges_of_a_batch(bottleneck, batch_x, batch_u):
    """One image, an odd number; all padding, a mask without a label, no class found: numbers, and gradients for all."""
    model = make_model(bottleneck, crop=64)
    method = attached(model)
    labeled, unlabeled = random_batches(method, batch_x, batch_u, size=(64, 64))
    nowhere = replace(unlabeled, valid=torch.zeros_like(unlabeled.valid))
    with torch.no_grad():
        model.heads["classifier"].linear.bias.fill_(-100.0)
    for batch, mask in ((nowhere, torch.full_like(labeled.mask, 255)), (unlabeled, torch.zeros_like(labeled.mask))):
        losses = method.losses(Student(model, read_memory=True), LabeledBatch(labeled.image, mask), batch, FIRST)
        model.zero_grad()
        losses["loss"].backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert (losses["loss_u"] == 0) == (batch is nowhere)


def test_view_is_jittered_and_aligned():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    views = [PHOTOMETRIC["pseudoseg"](image, np.random.default_rng(seed)) for seed in range(40)]
    assert len({view.tobytes() for view in views}) == 40 and all(not np.array_equal(view, image) for view in views)
    assert all(np.ptp(view, axis=-1).max() > 0 for view in views)  # none is gray
    again = PHOTOMETRIC["pseudoseg"](image, np.random.default_rng(3))
    assert np.array_equal(again, views[3]) and again.dtype == np.uint8
    flat = np.asarray(Image.new("RGB", (16, 16), (200, 40, 90))).copy()
    flat[:, 8:] = (20, 160, 60)
    for seed in range(20):  # no blur: pixels of one color have one color afterwards
        view = PHOTOMETRIC["pseudoseg"](flat, np.random.default_rng(seed))
        assert (view[:, :8] == view[0, 0]).all() and (view[:, 8:] == view[0, 8]).all()


@pytest.mark.parametrize(
    ("dataset", "background"), [("pascal", 0), ("coco", 0), ("cityscapes", None), ("camvid", None)]
)
def test_recipe(dataset, background):
    recipe = complete(load_recipe(dataset, "pseudoseg"))
    assert recipe.method.options["gamma"] == recipe.method.options["temperature"] == 0.5
    assert build_method(recipe, spec_for(recipe.data)).background == background


@pytest.mark.parametrize(
    "options", [{"gamma": 1.2}, {"temperature": 0.0}, {"temperature": -1.0}, {"unlabeled_weight": -1.0}]
)
def test_bad_options(options):
    with pytest.raises(UserError, match=f"method.{next(iter(options))}="):
        PseudoSeg(CrossEntropy(), **options)


def test_background_only_data():
    model = build_model(ModelConfig(encoder="tiny", pretrained="none"), num_classes=1, crop_size=64)
    with pytest.raises(UserError, match="only the background class; set data.custom.background to none"):
        PseudoSeg(CrossEntropy(), 0).attach(model)
