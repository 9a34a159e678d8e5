"""iMAS: each formula against a literal loop, its views and its recipe."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from allspark.build import build_method, complete
from allspark.config import CustomDataConfig
from allspark.config_io import load_recipe
from allspark.data import transforms
from allspark.data.batch import LabeledBatch, UnlabeledBatch, normalize
from allspark.data.datasets import DATASETS, spec_for
from allspark.data.datasets.custom import make_spec
from allspark.data.transforms import IMAS_OPERATIONS, PHOTOMETRIC
from allspark.methods import METHODS, Progress
from allspark.methods.imas import clipped_boxes, easiness, opposite_ranks
from allspark.models.student import Student
from allspark.pseudo_labels import Pseudo
from allspark.utils.errors import UserError
from helpers.networks import CLASSES, CROP, FIRST, make_method, make_model, random_batches

NOTHING_SURE = 1.0  # a threshold that no softmax reaches here


def prediction(label, confidence=1.0, classes=CLASSES):
    """A network's view of images whose labels (B, H, W) and confidence we choose."""
    label = torch.as_tensor(label)
    logits = torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()
    return Pseudo(logits, label, torch.as_tensor(confidence) * torch.ones(label.shape))


def literal_easiness(student, teacher, threshold, background, counted=None):
    """Image by image, class by class, with nan for 0 / 0 as the formula has it."""

    def weighted_iou(a, b):
        total, weights = 0.0, 0.0
        for k in range(CLASSES):
            if k != background and (b == k).any():
                total += (b == k).mean() * ((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum()
                weights += (b == k).mean()
        return total / weights if weights else 0.0

    easy = []
    for i in range(len(student.label)):
        keep = torch.ones_like(student.label[i], dtype=torch.bool) if counted is None else counted[i]
        a, b = student.label[i][keep].numpy(), teacher.label[i][keep].numpy()
        rho_a, rho_b = ((p.confidence[i][keep].numpy() >= threshold).mean() for p in (student, teacher))
        if all((x == background).all() for x in (a, b)):
            easy.append((rho_a + rho_b) / 2)
        else:
            easy.append((weighted_iou(a, b) * rho_b + weighted_iou(b, a) * rho_a) / 2)
    return torch.tensor(easy, dtype=torch.float32)


@pytest.mark.parametrize("background", [0, 3, None])
def test_easiness_equals_loop(background):
    torch.manual_seed(0)
    upper = torch.tensor([1, 2, 3, 4, 5, 5]).view(-1, 1, 1)  # so that classes are absent from some images
    label = torch.randint(0, 10**6, (6, 9, 11)) % upper
    other = torch.where(torch.rand(6, 9, 11) < 0.7, label, torch.randint(0, CLASSES, (6, 9, 11)))
    other[0] = label[0]
    student, teacher = prediction(label, torch.rand(6, 9, 11)), prediction(other, torch.rand(6, 9, 11))
    expected = literal_easiness(student, teacher, 0.4, background)
    easy = easiness(student, teacher, 0.4, background)
    torch.testing.assert_close(easy, expected)
    assert 0 <= easy.min() and easy.max() <= 1 and len(set(easy.tolist())) == 6
    torch.testing.assert_close(easiness(teacher, student, 0.4, background), expected)  # symmetric


def test_easiness_of_counted_pixels():
    """Pixels that do not count are as if they were cut off."""
    torch.manual_seed(0)
    label, other = (torch.randint(0, CLASSES, (2, 6, 8)) for _ in range(2))
    confidence = torch.rand(2, 6, 8)
    counted = torch.ones(2, 6, 8, dtype=torch.bool)
    counted[:, 4:] = False
    found = easiness(prediction(label, confidence), prediction(other, confidence.flip(0)), 0.4, 0, counted)
    rows = [x[:, :4] for x in (label, confidence, other, confidence.flip(0))]
    torch.testing.assert_close(found, easiness(prediction(*rows[:2]), prediction(*rows[2:]), 0.4, 0))
    same = label.clone()
    same[:, 4:] = (label[:, 4:] + 1) % CLASSES  # they disagree on padding alone
    assert easiness(prediction(label), prediction(same), 0.5, 0, counted).tolist() == [1, 1]
    assert easiness(prediction(label), prediction(label), 0.5, 0, torch.zeros_like(counted)).tolist() == [0, 0]


def test_background_only_image():
    nothing = torch.zeros(1, 4, 4, dtype=torch.long)
    half_sure = torch.tensor([1.0, 0.0]).repeat(8).view(1, 4, 4)
    assert easiness(prediction(nothing), prediction(nothing, half_sure), 0.9, 0).item() == 0.75
    object_somewhere = nothing.clone()
    object_somewhere[0, 0, 0] = 2
    assert easiness(prediction(nothing), prediction(object_somewhere), 0.9, 0).item() == 0  # they share no object


def test_class_0_may_be_foreground():
    """Where nothing is background class 0 weighs like any other: disagreement about the road makes an image hard."""
    road = torch.zeros(1, 4, 4, dtype=torch.long)
    road[0, 3] = 1
    half_road = road.clone()
    half_road[0, :2] = 4
    easy = {background: easiness(prediction(road), prediction(half_road), 0.5, background) for background in (0, None)}
    by_hand = (4 / 16 * 4 / 12 + 4 / 16 + 12 / 16 * 4 / 12 + 4 / 16) / 2  # IoU of the road 4/12, of class 1 1, of 4 0
    torch.testing.assert_close(easy[None], torch.tensor([by_hand]))
    torch.testing.assert_close(easy[0], torch.tensor([(4 / 12 + 1) / 2]))  # only class 1, and class 4 in one of them
    sure = prediction(torch.zeros(1, 4, 4, dtype=torch.long))
    assert easiness(sure, sure, 0.5, None).item() == 1


def test_easiness_limits():
    label = torch.randint(0, CLASSES, (3, 8, 8))
    assert easiness(prediction(label, 0.3), prediction(label, 0.3), 0.5, 0).tolist() == [0, 0, 0]
    assert easiness(prediction(label), prediction(label), 0.5, 0).tolist() == [1, 1, 1]


def test_partners_by_rank():
    assert opposite_ranks(torch.tensor([0.1, 0.9, 0.5, 0.7])).tolist() == [1, 0, 3, 2]
    assert opposite_ranks(torch.tensor([0.1, 0.9, 0.5, 0.7, 0.6])).tolist() == [1, 0, 3, 2, 4]  # the middle one: itself
    assert opposite_ranks(torch.zeros(4)).tolist() == [3, 2, 1, 0]
    for size in range(2, 9):
        easy = torch.rand(size)
        partner, ranks = opposite_ranks(easy), easy.argsort().argsort()
        assert all(ranks[i] + ranks[partner[i]] == size - 1 for i in range(size))
        assert sum(partner[i] == i for i in range(size)) == size % 2


def test_box_ratio_and_clipping():
    torch.manual_seed(0)
    height, width, ratios, cut = 32, 64, [], []
    for _ in range(200):
        boxes = clipped_boxes(torch.empty(4, 3, height, width))
        rows, columns = boxes.any(2), boxes.any(1)  # (B, H), (B, W)
        assert boxes.shape == (4, height, width) and torch.equal(boxes, rows[:, :, None] & columns[:, None, :])
        whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
        if whole.any():
            high, wide = rows.sum(1)[whole], columns.sum(1)[whole]
            assert high.unique().numel() == wide.unique().numel() == 1  # one size for the batch
            assert abs(high[0] / height - wide[0] / width) < 2 / height  # the same share of both sides
            ratios.append((wide[0] / width).item())
            cut += (rows.sum(1)[rows[:, 0]] - high[0]).tolist()
    assert 0.09 < min(ratios) < 0.15 and min(cut) < 0 == max(cut)


def test_sides_are_uniform():
    """The largest of many boxes of a batch is as long as drawn: hardly ever are all of them cut."""
    torch.manual_seed(0)
    sides = [clipped_boxes(torch.empty(32, 3, 100, 16)).any(2).sum(1).max().item() / 100 for _ in range(500)]
    assert 0.08 < min(sides) < 0.12 and 0.87 < max(sides) < 0.92
    assert np.abs(np.quantile(sides, [0.25, 0.5, 0.75]) - [0.3, 0.5, 0.7]).max() < 0.05


def test_box_centers():
    """Uniform over the pixels from 1/16 of the side on: a box that is cut nowhere is odd and its middle the center."""
    torch.manual_seed(0)
    side, place, lasts = 64, torch.arange(64), []
    centers = []
    for _ in range(300):
        rows = clipped_boxes(torch.empty(16, 3, side, 4)).any(2)
        whole = ~(rows[:, 0] | rows[:, -1])
        centers += ((rows * place).sum(1) / rows.sum(1))[whole].tolist()
        lasts.append((rows * place).amax(1).min().item())
    counts = np.bincount(np.array(centers, int), minlength=side)[24:40]
    assert all(center.is_integer() for center in centers) and counts.min() > 0.6 * counts.mean()
    assert min(lasts) >= side // 16 + 3  # no center is nearer to the first row, no half side shorter


def unlike_pair(threshold=0.6, **options):
    """A student and a method whose teacher sees things a little differently, both without randomness."""
    model = make_model("none", dropout=0.0, drop_path=0.0)
    method = make_method("imas", background=0, threshold=threshold, **options)
    method.attach(model)
    with torch.no_grad():
        for network in (model, method.teacher.model):
            network.decoder.classifier.weight.mul_(4)
        method.teacher.model.decoder.classifier.bias.add_(0.5 * torch.randn(CLASSES, generator=torch.manual_seed(3)))
    return model, method


def literal_views(unlabeled, pseudo, easy, seed):
    """The views of a batch as lists over images: (image, label, confidence, valid, e), with the same draws."""
    size, (height, width) = len(easy), unlabeled.weak.shape[-2:]
    views = []
    for i in range(size):
        blend = easy[i] * unlabeled.strong[0][i] + (1 - easy[i]) * unlabeled.weak[i]
        views.append((blend, pseudo.label[i], pseudo.confidence[i], unlabeled.valid[i], easy[i]))
    torch.manual_seed(seed)
    if size == 1 or torch.rand(()) >= easy.mean():
        return views
    ratio = torch.empty(()).uniform_(0.1, 0.9).item()
    rows = torch.randint(height // 16, height, (size, 1)).flatten().tolist()
    columns = torch.randint(width // 16, width, (size, 1)).flatten().tolist()
    ranked = sorted(range(size), key=lambda i: easy[i])
    for i in range(size):
        partner = ranked[size - 1 - ranked.index(i)]
        sources = (unlabeled.weak, pseudo.label, pseudo.confidence, unlabeled.valid)
        mixed = [source[i].clone() for source in sources]
        for y in range(height):
            for x in range(width):
                if abs(y - rows[i]) < ratio * height / 2 and abs(x - columns[i]) < ratio * width / 2:
                    for part, source in zip(mixed, sources, strict=True):
                        part[..., y, x] = source[partner][..., y, x]
        views.append((*mixed, easy[i]))
    return views


@pytest.mark.parametrize(("batch", "seed", "mixes"), [(2, 3, True), (3, 3, True), (2, 1, False), (1, 3, False)])
@pytest.mark.parametrize("ignore_padding", [False, True])
def test_losses_literal(batch, seed, mixes, ignore_padding):
    """Labels of the teacher; one pass over labeled, weak and perturbed images; per image over all pixels, times e."""
    model, method = unlike_pair(ignore_padding=ignore_padding)
    labeled, unlabeled = random_batches(method, 2, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        pseudo = Pseudo.of(method.teacher.model(unlabeled.weak).logits)
        student = Pseudo.of(twin.eval()(unlabeled.weak).logits)
    easy = literal_easiness(student, pseudo, 0.6, 0, unlabeled.valid if ignore_padding else None)
    assert 0.05 < easy.min() and easy.max() < 0.95, easy
    views = literal_views(unlabeled, pseudo, easy, seed)
    assert (len(views) > batch) == mixes

    images = torch.stack([view[0] for view in views])
    logits = twin.train()(torch.cat((labeled.image, unlabeled.weak, images))).logits
    each = []
    for (_, label, confidence, valid, weight), score in zip(views, logits[2 + batch :].log_softmax(1), strict=True):
        keep = (confidence >= 0.6) & (valid if ignore_padding else True)
        assert 0.05 < keep.float().mean() < 0.95
        total = -score.gather(0, label[None])[0][keep].sum()
        each.append(weight * total / (valid.sum() if ignore_padding else valid.numel()))
    intensity, cutmix = sum(each[:batch]) / batch, sum(each[batch:]) / batch
    loss_u = (intensity + cutmix) / 2 if mixes else intensity

    torch.manual_seed(seed)
    losses = method.losses(Student(model), labeled, unlabeled, FIRST)
    torch.testing.assert_close(losses["easiness"], easy.mean())
    torch.testing.assert_close(losses["loss_u"], loss_u)
    torch.testing.assert_close(losses["loss_x"], method.criterion(logits[:2], labeled.mask))
    torch.testing.assert_close(losses["loss"], losses["loss_x"] + 3 * losses["loss_u"])
    for (name, ours), literal in zip(model.named_buffers(), twin.buffers(), strict=True):  # batch norm saw the same
        torch.testing.assert_close(ours, literal, msg=name)


def easy_batch(size, easy):
    """`size` images that are their own index, strong views 10 higher, labels likewise; e as given."""
    weak = torch.arange(size).view(-1, 1, 1, 1).expand(size, 3, CROP, CROP).float()
    unlabeled = UnlabeledBatch(weak, (weak + 10,), torch.ones(size, CROP, CROP, dtype=torch.bool), ())
    pseudo = prediction(weak[:, 0].long(), 1.0, classes=10)
    return unlabeled, pseudo, torch.as_tensor(easy)


def test_intensity_follows_easiness():
    image, *_ = make_method("imas").perturbed(*easy_batch(3, [0.0, 0.0, 0.0]))  # mean 0: never mixed
    assert [picture.unique().item() for picture in image] == [0, 1, 2]
    images = [make_method("imas").perturbed(*easy_batch(2, [0.25, 1.0]))[0] for _ in range(5)]
    assert all(image[0].eq(2.5).all() and image[1].eq(11).all() for image in images)


def test_cutmix_frequency():
    method = make_method("imas")
    torch.manual_seed(0)
    mixed = [len(method.perturbed(*easy_batch(4, [0.1, 0.2, 0.5, 0.4]))[0]) == 8 for _ in range(300)]
    assert abs(sum(mixed) / 300 - 0.3) < 0.08


def test_odd_batch_keeps_middle():
    torch.manual_seed(0)
    image, label, sure, valid = make_method("imas").perturbed(*easy_batch(5, [1.0, 0.999, 0.998, 0.997, 1.0]))
    assert len(image) == len(label) == len(sure) == len(valid) == 10
    assert torch.equal(image[5:, 0], label[5:].float())  # labels are pasted likewise
    assert [set(picture.unique().tolist()) for picture in image[5:]] == [{0, 2}, {1}, {0, 2}, {3, 4}, {3, 4}]


def test_single_image_is_not_mixed():
    assert all(len(make_method("imas").perturbed(*easy_batch(1, [1.0]))[0]) == 1 for _ in range(10))


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize("ignore_padding", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_padding_only_crop(bottleneck, ignore_padding, batch):
    model, method = make_model(bottleneck), make_method("imas", threshold=0.0, ignore_padding=ignore_padding)
    method.attach(model)
    labeled, unlabeled = random_batches(method, 1, batch)
    black = normalize(torch.zeros_like(unlabeled.weak))
    padding = UnlabeledBatch(black, (black,), torch.zeros_like(unlabeled.valid), unlabeled.cutmix)
    unlabeled_mask = LabeledBatch(labeled.image, torch.full_like(labeled.mask, 255))
    losses = method.losses(Student(model), unlabeled_mask, padding, FIRST)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (losses["loss_u"].item() == 0) == ignore_padding and losses["loss_x"].item() == 0


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
def test_nothing_confident(bottleneck):
    model, method = make_model(bottleneck), make_method("imas", threshold=NOTHING_SURE)
    method.attach(model)
    losses = method.losses(Student(model), *random_batches(method, 2, 3), FIRST)
    losses["loss"].backward()
    assert losses["loss_u"].item() == losses["mask_ratio"].item() == losses["easiness"].item() == 0
    assert losses["loss"].item() == losses["loss_x"].item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("read_memory", [False, True])
def test_bottleneck_pass_order(read_memory):
    """The joint pass holds labeled and weak images, its enqueue reads the teacher; the other one writes nothing."""
    model = make_model(dropout=0.0, drop_path=0.0)
    method = make_method("imas", threshold=0.0)
    method.attach(model)
    with torch.no_grad():
        method.teacher.model.decoder.classifier.bias.add_(1)  # other logits, the same labels and confidences
    labeled, unlabeled = random_batches(method, 2, 3)
    passes = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: passes.append((len(args[0]), args[1])))
    losses = method.losses(Student(model, read_memory), labeled, unlabeled, FIRST)
    assert losses["easiness"].item() == 1  # they agree, with a threshold of 0: always mixed
    (weak, none), (joint, cross), (later, alone) = passes
    assert (weak, none, joint, later, alone.num_labeled) == (3, None, 5, 6, 0)
    assert (cross.num_labeled, cross.read_memory, alone.pseudo_logits) == (2, read_memory, None)
    torch.testing.assert_close(cross.pseudo_logits, method.teacher.model(unlabeled.weak).logits)


def test_teacher_follows_and_is_evaluated():
    model, method = make_model("none"), make_method("imas")
    method.attach(model)
    start = model.decoder.classifier.bias.detach().clone()
    with torch.no_grad():
        model.decoder.classifier.bias.add_(1)
    method.after_step(Student(model), Progress(step=1, epoch=1, total_steps=10**4))  # 1 - 1 / 2
    torch.testing.assert_close(method.predictor(model).decoder.classifier.bias, start + 0.5)
    with torch.no_grad():
        model.decoder.classifier.bias.copy_(start)
    method.after_step(Student(model), Progress(step=9000, epoch=3, total_steps=10**4))
    torch.testing.assert_close(method.predictor(model).decoder.classifier.bias, start + 0.5 * 0.996)


@pytest.mark.parametrize("burn_in_epochs", [0, 2])
def test_teacher_is_copy_in_first_epoch(burn_in_epochs):
    """Through the supervised start and the first epoch with unlabeled images; then it is an average."""
    model, method = make_model("none"), make_method("imas")
    method.attach(model)
    for step in range(400, 404):
        epoch = step - 400
        with torch.no_grad():
            for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                value.add_(1)
        method.after_step(Student(model), Progress(step, epoch, 1000, burn_in_epochs))
        own, teacher = model.state_dict(), method.predictor(model).state_dict()
        assert all(torch.equal(own[name], value) for name, value in teacher.items()) == (epoch <= burn_in_epochs)
        if epoch > burn_in_epochs:
            break
    assert epoch == burn_in_epochs + 1


# Name, range and what it is in Pillow's own words
OPERATIONS = (
    ("identity", None, lambda p, v: p),
    ("autocontrast", None, lambda p, v: ImageOps.autocontrast(p)),
    ("equalize", None, lambda p, v: ImageOps.equalize(p)),
    ("invert", None, lambda p, v: ImageOps.invert(p)),
    ("blur", (0.1, 2), lambda p, v: p.filter(ImageFilter.GaussianBlur(v))),
    ("contrast", (0.1, 0.95), lambda p, v: ImageEnhance.Contrast(p).enhance(v)),
    ("brightness", (0.1, 0.95), lambda p, v: ImageEnhance.Brightness(p).enhance(v)),
    ("color", (0.1, 0.95), lambda p, v: ImageEnhance.Color(p).enhance(v)),
    ("sharpness", (0.1, 0.95), lambda p, v: ImageEnhance.Sharpness(p).enhance(v)),
    ("posterize", (4, 8), lambda p, v: p.point(lambda value: value >> (8 - int(v)) << (8 - int(v)))),
    ("solarize", (1, 256), lambda p, v: p.point(lambda value: 255 - value if value >= int(v) else value)),
    ("hue", (-0.5, 0.5), lambda p, v: turn_hue(p, v)),
)


def turn_hue(picture, share):
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(share * 255)) % 256
    return Image.fromarray(hsv, "HSV").convert("RGB")


def noise(seed=0, size=24):
    return np.random.default_rng(seed).integers(30, 200, (size, size, 3), np.uint8)


def test_strong_view_operations():
    """Against Pillow for the same draws: which, with replacement, then how strong."""
    image, seen = noise(), set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        chosen, strengths = rng.integers(12, size=2), rng.random(2).tolist()
        expected = Image.fromarray(image)
        for index, share in zip(chosen, strengths, strict=True):
            _, span, operation = OPERATIONS[index]
            expected = operation(expected, None if span is None else span[0] + (span[1] - span[0]) * share)
        twin = np.random.default_rng(seed)
        assert np.array_equal(PHOTOMETRIC["imas"](image, twin), np.array(expected)), (seed, chosen)
        assert twin.random() == rng.random()  # as many draws, whatever they say
        seen.add(tuple(chosen))
    assert len(IMAS_OPERATIONS) == len({index for pair in seen for index in pair}) == 12
    assert any(a == b for a, b in seen)


def test_hue_turns_both_ways():
    """Over many draws, a single color comes back turned forward as often as back, by up to half a turn."""
    image, turns = np.full((1, 1, 3), (200, 40, 40), np.uint8), []
    start, only_hue = (
        int(Image.fromarray(image).convert("HSV").getpixel((0, 0))[0]),
        [("hue", *IMAS_OPERATIONS[-1][1:])],
    )
    assert IMAS_OPERATIONS[-1][0] == "hue"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "IMAS_OPERATIONS", only_hue + [("identity", 0, 0)])
        for seed in range(2000):
            rng = np.random.default_rng(seed)
            if rng.integers(2, size=2).tolist() == [0, 1]:
                turned = Image.fromarray(PHOTOMETRIC["imas"](image, np.random.default_rng(seed)))
                turns.append((int(turned.convert("HSV").getpixel((0, 0))[0]) - start + 128) % 256 - 128)
    back = np.mean([turn < 0 for turn in turns])
    assert 0.4 < back < 0.6 and min(turns) < -110 and max(turns) > 110


def test_background_from_spec():
    named = {name: spec.classes[spec.background] for name, spec in DATASETS.items() if spec.background is not None}
    assert named == {"pascal": "background", "coco": "void", "shapes": "background"}
    for dataset in ("pascal", "cityscapes", "camvid"):
        recipe = complete(load_recipe(dataset, "imas"))
        spec = spec_for(recipe.data)
        assert build_method(recipe, spec).background == spec.background
    with pytest.raises(UserError, match=r"method.background: unknown option"):
        complete(load_recipe("pascal", "imas", {"method.background": 3}))


def test_background_of_custom_data():
    assert make_spec("mine", CustomDataConfig(classes=("a", "b"))).background is None
    assert make_spec("mine", CustomDataConfig(classes=("a", "b"), background=1)).background == 1
    with pytest.raises(UserError, match=r"data.custom.background: 2 is not a class index 0..1"):
        make_spec("mine", CustomDataConfig(classes=("a", "b"), background=2))


def test_bad_options():
    with pytest.raises(UserError, match=r"method.threshold=70"):
        METHODS["imas"](None, threshold=70)
    with pytest.raises(UserError, match=r"method.teacher_momentum=1"):
        METHODS["imas"](None, teacher_momentum=1.0)
    with pytest.raises(UserError, match=r"method.unlabeled_weight=-3"):
        METHODS["imas"](None, unlabeled_weight=-3.0)
