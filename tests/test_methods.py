"""Every method, with and without the bottleneck: what the loop relies on, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from allspark.batch import LabeledBatch, UnlabeledBatch
from allspark.cli.recipe import complete
from allspark.config import BottleneckConfig, ModelConfig, OptimConfig, load_recipe
from allspark.data import DATASETS, shapes
from allspark.engine.optim import build_optimizer
from allspark.losses import OHEM, CrossEntropy, consistency_loss
from allspark.methods import METHODS, Progress
from allspark.methods.base import joint_forward
from allspark.models.segmentor import build_model
from allspark.pseudo import Pseudo, cutmix, predict_pseudo

CROP, CLASSES = 65, 5
FIRST = Progress(step=0, epoch=0, total_steps=10)
CASES = [
    (name, bottleneck)
    for name, kind in METHODS.items()
    for bottleneck in (("none", "allspark") if kind.takes_bottleneck else ("none",))
]


def make_model(bottleneck="allspark", classes=CLASSES, crop=CROP, **options):
    torch.manual_seed(0)
    cfg = ModelConfig(encoder="mit_b0", bottleneck=BottleneckConfig(name=bottleneck), **options)
    return build_model(cfg, classes, crop).train()


def make_method(name, **options):
    return METHODS[name](CrossEntropy(), **options)


def random_batches(method, batch_x=2, batch_u=2, size=(CROP, CROP), classes=CLASSES):
    generator = torch.Generator().manual_seed(1)

    def images(batch):
        return torch.randn(batch, 3, *size, generator=generator)

    mask = torch.randint(0, classes, (batch_x, *size), generator=generator)
    boxes = tuple(torch.rand(batch_u, *size, generator=generator) < 0.3 for _ in method.views.strong)
    valid = torch.rand(batch_u, *size, generator=generator) < 0.9
    strong = tuple(images(batch_u) for _ in method.views.strong)
    return LabeledBatch(images(batch_x), mask), UnlabeledBatch(images(batch_u), strong, valid, boxes)


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_losses_and_gradients(name, bottleneck):
    """Finite losses, a gradient for every trainable parameter (DDP waits for each), train mode kept."""
    model, method = make_model(bottleneck), make_method(name)
    method.attach(model)
    losses = method.losses(model, *random_batches(method), FIRST)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert model.training
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_supervised_start_reaches_every_parameter():
    model, method = make_model("allspark"), make_method("allspark")
    labeled, _ = random_batches(method)
    method.supervised_losses(model, labeled)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("share_keys", [False, True])
def test_pseudo_pass_changes_nothing(share_keys):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pseudo = predict_pseudo(model, torch.randn(2, 3, CROP, CROP), share_keys)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and not pseudo.logits.requires_grad
    assert torch.equal(pseudo.label, pseudo.logits.argmax(1))
    torch.testing.assert_close(pseudo.confidence, pseudo.logits.softmax(1).amax(1))


def test_one_enqueue_per_step():
    """Every channel of every unlabeled image of the joint pass is written once, whichever method it is."""
    for name, kind in METHODS.items():
        if kind.takes_bottleneck:
            model, method = make_model(), make_method(name)
            method.attach(model)
            writes = []
            enqueue = model.bottleneck.memory.enqueue
            model.bottleneck.memory.enqueue = lambda f, c, w=writes, e=enqueue: (w.append(f.shape), e(f, c))
            method.losses(model, *random_batches(method), FIRST)
            images = {"unimatch_v2": 4}.get(name, 2)  # both strong views are in its joint pass
            assert [shape[:2] for shape in writes] == [(images, 256)], name


@pytest.mark.parametrize(("batch_x", "batch_u"), [(1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("read_memory", [False, True])
def test_batches_may_differ_in_size(batch_x, batch_u, read_memory):
    model, method = make_model(), make_method("allspark", warmup_epochs=0 if read_memory else 1)
    losses = method.losses(model, *random_batches(method, batch_x, batch_u), FIRST)
    assert torch.isfinite(losses["loss"])


def test_helper_makes_the_pseudo_pass_where_a_method_has_none():
    model = make_model(dropout=0.0, drop_path=0.0)
    image = torch.randn(2, 3, CROP, CROP)
    expected = predict_pseudo(model, image).logits
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    joint_forward(model, torch.randn(2, 3, CROP, CROP), image)
    torch.testing.assert_close(seen[-1].pseudo_logits, expected)


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize("size", [(32, 32), (45, 77), (64, 96)])
def test_inference_does_not_depend_on_batch_mates(bottleneck, size):
    model = make_model(bottleneck).eval()
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    assert together.shape == (3, CLASSES, *size)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_training_at_a_crop_that_is_no_multiple_of_32():
    for crop in (64, 70, 96):
        model, method = make_model(crop=crop), make_method("allspark", warmup_epochs=0)
        losses = method.losses(model, *random_batches(method, size=(crop, crop)), FIRST)
        assert torch.isfinite(losses["loss"])


def test_allspark_options_change_what_they_say():
    model = make_model(dropout=0.0, drop_path=0.0)
    batches = None
    results = {}
    options = {
        "released": {},
        "padding ignored": {"ignore_padding": True},
        "threshold": {"threshold": 0.5},
        "image context": {"pseudo_context": "image"},
        "strong view": {"unlabeled_view": "strong", "cutmix": 0.5},
    }
    for label, given in options.items():
        method = make_method("allspark", warmup_epochs=9, **given)
        batches = random_batches(method)
        torch.manual_seed(2)
        results[label] = method.losses(model, *batches, FIRST)["loss_u"].item()
    assert len(set(results.values())) == len(results), results


def test_revised_recipe_reaches_every_parameter():
    """All its options at once, with the memory read; its threshold lowered, or an untrained network learns nothing."""
    recipe = complete(load_recipe("shapes", "allspark_revised", {"method.threshold": 0.0, "method.warmup_epochs": 0}))
    torch.manual_seed(0)
    model = build_model(recipe.model, CLASSES, CROP).train()
    method = METHODS[recipe.method.name](CrossEntropy(), **recipe.method.options)
    method.attach(model)
    losses = method.losses(model, *random_batches(method), FIRST)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_fixmatch_literal():
    """Label of the train-mode weak pass, pasted region of the evaluation pass over the partner, denominator = valid."""
    model = make_model("none", dropout=0.0, drop_path=0.0)
    method = make_method("fixmatch", threshold=0.3)
    labeled, unlabeled = random_batches(method)
    box, valid = unlabeled.cutmix[0], unlabeled.valid
    losses = method.losses(model, labeled, unlabeled, FIRST)

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


def test_cutmix_takes_another_image():
    x = torch.arange(3).view(3, 1, 1, 1).expand(3, 2, 4, 4).float()
    box = torch.zeros(3, 4, 4, dtype=torch.bool)
    box[:, :2] = True
    mixed = cutmix(x, box)
    for i in range(3):
        assert mixed[i, :, :2].eq((i - 1) % 3).all() and mixed[i, :, 2:].eq(i).all()
    single = torch.randn(1, 2, 4, 4)
    assert torch.equal(cutmix(single, box[:1]), single)
    pseudo = Pseudo.of(torch.randn(2, 3, 4, 4))
    assert torch.equal(pseudo.cutmix(box[:2]).label, cutmix(pseudo.label, box[:2]))


def test_losses_without_a_pixel_are_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    ignored = torch.full((2, 4, 4), 255)
    for criterion in (CrossEntropy(), OHEM(0.7, 100)):
        loss = criterion(logits, ignored)
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(logits.grad).all()
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    loss, ratio = consistency_loss(logits, ignored.clamp(max=2), None, nothing)
    assert loss.item() == 0 and ratio.item() == 0


def test_consistency_denominator_is_valid_pixels():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    keep, valid = torch.rand(2, 4, 4) < 0.5, torch.rand(2, 4, 4) < 0.8
    each = F.cross_entropy(logits, label, reduction="none")
    loss, ratio = consistency_loss(logits, label, keep, valid)
    torch.testing.assert_close(loss, each[keep & valid].sum() / valid.sum())
    torch.testing.assert_close(ratio, (keep & valid).sum() / valid.sum())


def test_labels_beyond_the_ignore_index_fail_loudly():
    with pytest.raises((IndexError, RuntimeError)):
        CrossEntropy()(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 7))


def shapes_batches(method, batch=4):
    pairs = [shapes.render("train", index) for index in range(2 * batch)]
    image = torch.stack([torch.from_numpy(i).permute(2, 0, 1)[:, :CROP, :CROP] for i, _ in pairs])
    mask = torch.stack([torch.from_numpy(m)[:CROP, :CROP].long() for _, m in pairs[:batch]])
    box = torch.zeros(batch, CROP, CROP, dtype=torch.bool)
    box[:, 10:30, 10:30] = True
    valid = torch.ones(batch, CROP, CROP, dtype=torch.bool)
    strong, boxes = (image[batch:],) * len(method.views.strong), (box,) * len(method.views.strong)
    cpu = torch.device("cpu")
    return LabeledBatch(image[:batch], mask).to(cpu), UnlabeledBatch(image[batch:], strong, valid, boxes).to(cpu)


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_loss_falls_on_shapes(name, bottleneck):
    model = make_model(bottleneck, DATASETS["shapes"].num_classes)
    method = make_method(name)
    method.attach(model)
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-3, lr_multi=1.0, weight_decay=0.01), model)
    batches = shapes_batches(method)
    labeled_losses = []
    for step in range(12):
        torch.manual_seed(step)
        losses = method.losses(model, *batches, Progress(step, step // 6, 12))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        method.after_step(model, Progress(step, step // 6, 12))
        labeled_losses.append(losses["loss_x"].item())
    assert sum(labeled_losses[-3:]) < 0.8 * sum(labeled_losses[:3])


@pytest.mark.parametrize(("name", "bottleneck"), CASES)
def test_state_dict_round_trip(name, bottleneck):
    model, method = make_model(bottleneck), make_method(name)
    method.attach(model)
    other = make_model(bottleneck)
    again = make_method(name)
    again.attach(other)
    other.load_state_dict(model.state_dict(), strict=True)
    again.load_state_dict(method.state_dict(), strict=True)
    if bottleneck == "allspark":
        assert torch.equal(other.bottleneck.memory.queue, model.bottleneck.memory.queue)
