"""Every method, with and without the bottleneck: requirements of the training step, edge cases, learning."""

import copy
from dataclasses import replace

import pytest
import torch

from allspark.build import build_loader, build_method, complete
from allspark.config_io import load_recipe
from allspark.data.batch import LabeledBatch, normalize
from allspark.data.datasets import DATASETS, shapes
from allspark.data.spec import Sample
from allspark.data.splits import Lists
from allspark.engine.optim import build_optimizer
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.segmentor import build_model
from allspark.models.student import Student, predict
from allspark.pseudo_labels import Pseudo, cutmix
from helpers.networks import (
    CASES,
    CLASSES,
    CROP,
    FIRST,
    WIDTHS,
    assert_numbers,
    attached,
    learning,
    make_method,
    make_model,
    quiet_model,
    random_batches,
    takes,
)

everywhere = pytest.mark.parametrize(("name", "bottleneck"), CASES)


@everywhere
def test_losses_and_gradients(name, bottleneck):
    """As its constructor makes it; train mode is kept."""
    model, method = attached(name, bottleneck)
    losses = method.losses(Student(model), *random_batches(method), FIRST)
    losses["loss"].backward()
    assert_numbers(losses, model)
    assert all(module.training for module in model.modules())


@everywhere
def test_supervised_losses_reach_every_parameter(name, bottleneck):
    model, method = attached(name, bottleneck)
    labeled, _ = random_batches(method)
    losses = method.supervised_losses(Student(model), labeled)
    losses["loss"].backward()
    assert_numbers(losses, model)


@pytest.mark.parametrize("share_keys", [False, True])
def test_predict_changes_nothing(share_keys):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pseudo = predict(model, torch.randn(2, 3, CROP, CROP), share_keys)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not pseudo.logits.requires_grad and all(module.training for module in model.modules())
    assert torch.equal(pseudo.label, pseudo.logits.argmax(1))
    torch.testing.assert_close(pseudo.confidence, pseudo.logits.softmax(1).amax(1))
    frozen = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    predict(model, torch.randn(2, 3, CROP, CROP))
    assert frozen and not any(module.training for module in frozen)


@everywhere
def test_prediction_changes_no_buffer(name, bottleneck):
    """Of student or teacher: neither one within a step, which a bottleneck always needs, nor that of pseudo_labels."""
    model, method = attached(name, bottleneck, **learning(name))
    labeled, unlabeled = random_batches(method)
    kept, same = {}, []

    def before(network, _):
        kept[network] = [buffer.clone() for buffer in network.buffers()]

    def after(network, *_):
        if not network.training:
            same.append(all(map(torch.equal, kept[network], network.buffers())))

    for network in {model, method.predictor(model)}:
        network.register_forward_pre_hook(before)
        network.register_forward_hook(after)
    method.losses(Student(model, read_memory=True), labeled, unlabeled, FIRST)
    assert all(same) and (same or bottleneck == "none")
    state = {**copy.deepcopy(model.state_dict()), **copy.deepcopy(method.state_dict())}
    pseudo = method.pseudo_labels(Student(model), unlabeled.weak, unlabeled.valid)
    assert pseudo.label.shape == unlabeled.valid.shape and not pseudo.logits.requires_grad
    assert all(torch.equal(state[key], value) for part in (model, method) for key, value in part.state_dict().items())
    assert all(module.training for module in model.modules())


def test_one_enqueue_per_step():
    """Every channel of every unlabeled image of the joint pass is written once, whichever method it is."""
    for name in METHODS:
        if name != "supervised":
            model, method = attached(name, "allspark")
            writes = []
            enqueue = model.bottleneck.memory.enqueue
            model.bottleneck.memory.enqueue = lambda f, c, w=writes, e=enqueue: (w.append(f.shape), e(f, c))
            method.losses(Student(model), *random_batches(method), FIRST)
            ((images, channels, _),) = writes
            assert channels == WIDTHS[-1] and images in (2, 2 * len(method.views.strong)), name


@everywhere
@pytest.mark.parametrize(("batch_x", "batch_u"), [(1, 1), (1, 3), (3, 1)])
def test_different_batch_sizes(name, bottleneck, batch_x, batch_u):
    """And be odd, or of one image."""
    model, method = attached(name, bottleneck, **learning(name))
    losses = method.losses(Student(model, read_memory=True), *random_batches(method, batch_x, batch_u), FIRST)
    losses["loss"].backward()
    assert_numbers(losses, model)


@everywhere
def test_padding_only_crops(name, bottleneck):
    """Black, without a label and without a valid pixel: a loss that ignores padding is 0, not NaN."""
    for ignore_padding in (True, False) if takes(name, "ignore_padding") else (True,):
        model, method = attached(name, bottleneck, **learning(name, ignore_padding=ignore_padding))
        labeled, unlabeled = random_batches(method)
        black = normalize(torch.zeros_like(unlabeled.weak))
        nothing = torch.zeros_like(unlabeled.valid)
        padding = replace(unlabeled, weak=black, strong=(black,) * len(unlabeled.strong), valid=nothing)
        losses = method.losses(
            Student(model, read_memory=True), LabeledBatch(black, torch.full_like(labeled.mask, 255)), padding, FIRST
        )
        losses["loss"].backward()
        assert_numbers(losses, model)
        ignored = [value.item() for key, value in losses.items() if key.startswith("loss_u")]
        assert losses["loss_x"].item() == 0 and bool(ignored) == method.views.unlabeled
        assert not ignore_padding or set(ignored) <= {0.0}


@pytest.mark.parametrize(("name", "bottleneck"), [case for case in CASES if takes(case[0], "threshold")])
def test_nothing_confident(name, bottleneck):
    model, method = attached(name, bottleneck, **learning(name, threshold=1.0))
    losses = method.losses(Student(model, read_memory=True), *random_batches(method), FIRST)
    losses["loss"].backward()
    assert_numbers(losses, model)
    assert losses["loss_x"].item() > 0
    assert {value.item() for key, value in losses.items() if key.startswith("loss_u")} == {0.0}


@pytest.mark.parametrize("name", [name for name in METHODS if takes(name, "cutmix")])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_cutmix_in_every_method(name, batch):
    """What the network gets of each strong view; an image of a batch of one stays as it is."""
    strong = {"unlabeled_view": "strong", "cutmix": 0.5}
    model, method = attached(name, **{option: value for option, value in strong.items() if takes(name, option)})
    labeled, unlabeled = random_batches(method, batch, batch)
    inputs = []
    model.register_forward_pre_hook(lambda network, args: inputs.extend(args[0]))
    method.losses(Student(model), labeled, unlabeled, FIRST)
    for view, box in zip(unlabeled.strong, unlabeled.cutmix, strict=True):
        for i in range(batch):
            others = [torch.where(box[i], view[j], view[i]) for j in range(batch) if j != i] or [view[i]]
            assert any(torch.equal(image, other) for image in inputs for other in others)


def test_joint_pass_makes_pseudo_labels():
    model = make_model(dropout=0.0, drop_path=0.0)
    image = torch.randn(2, 3, CROP, CROP)
    expected = predict(model, image).logits
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    Student(model).joint(torch.randn(2, 3, CROP, CROP), image)
    torch.testing.assert_close(seen[-1].pseudo_logits, expected)


@pytest.mark.parametrize("bottleneck", ["none", "allspark"])
@pytest.mark.parametrize("size", [(32, 32), (45, 77), (64, 96)])
def test_inference_is_independent_of_batch_mates(bottleneck, size):
    model = make_model(bottleneck).eval()
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    assert together.shape == (3, CLASSES, *size)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_crop_not_multiple_of_32():
    for crop in (64, 70, 96):
        model, method = make_model(crop=crop), make_method("allspark")
        losses = method.losses(Student(model, read_memory=True), *random_batches(method, size=(crop, crop)), FIRST)
        assert torch.isfinite(losses["loss"])


def test_allspark_options_have_effects():
    """On the same network and images, which give the same loss again without the option."""
    labeled, unlabeled = random_batches(make_method("allspark", unlabeled_view="strong", cutmix=0.5))

    def loss_u(**given):
        model, method = quiet_model("allspark", seed=3), make_method("allspark", **given)
        strong, boxes = (unlabeled.strong, unlabeled.cutmix) if method.views.strong else ((), ())
        batch = replace(unlabeled, strong=strong, cutmix=boxes)
        return method.losses(Student(model), labeled, batch, FIRST)["loss_u"].item()

    assert loss_u() == loss_u()
    for given in (
        {"ignore_padding": True},
        {"threshold": 0.5},
        {"pseudo_context": "image"},
        {"unlabeled_view": "strong"},
        {"unlabeled_view": "strong", "cutmix": 0.5},
    ):
        assert loss_u(**given) != loss_u(), given


def test_revised_recipe_reaches_every_parameter():
    """All its options at once, with the memory read; its threshold lowered, or an untrained network learns nothing."""
    lowered = {"method.threshold": 0.01, "encoder": "tiny"}
    recipe = complete(load_recipe("shapes", "allspark_revised", lowered))
    torch.manual_seed(0)
    model = build_model(recipe.model, CLASSES, CROP).train()
    method = METHODS[recipe.method.name](CrossEntropy(), **recipe.method.options)
    method.attach(model)
    losses = method.losses(Student(model, read_memory=True), *random_batches(method), FIRST)
    losses["loss"].backward()
    assert_numbers(losses, model)


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


@pytest.fixture(scope="module")
def shapes_lists(tmp_path_factory):
    """A few pictures of the embedded data set, as files: 8 labeled ones and 12 without a label."""
    root = tmp_path_factory.mktemp("learn") / "shapes"
    shapes.generate(root, {"train": 20})
    images = sorted((root / "images/train").iterdir())
    pairs = tuple(Sample(image, root / "labels/train" / image.name) for image in images)
    return Lists(pairs[:8], tuple(Sample(image) for image in images[8:]), pairs[:4], "", "shapes")


@everywhere
def test_learns_from_shapes(name, bottleneck, shapes_lists):
    """Its recipe by way of the loader, 36 steps, all losses at work: the labeled loss falls, and the predictor's."""
    options = {f"method.{key}": value for key, value in learning(name).items() if key != "background"}
    small = {"encoder": "tiny", "crop_size": 64, "num_workers": 0, "batch_size": 2, "drop_path": 0.0, "lr": 3e-3}
    recipe = complete(load_recipe("shapes", name, {**small, "model.bottleneck": bottleneck, **options}))
    spec = DATASETS["shapes"]
    torch.manual_seed(0)
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size).train()
    method = build_method(recipe, spec)
    method.attach(model)
    optimizer = build_optimizer(recipe.optim, model)
    loader = build_loader(recipe, shapes_lists, spec, method.views)

    def predictors_loss():
        pseudo = [(predict(method.predictor(model), labeled.image), labeled.mask) for labeled in seen]
        return sum(method.criterion(prediction.logits, mask).item() for prediction, mask in pseudo)

    loader.set_epoch(0)
    seen = [labeled for labeled, _ in loader.on("cpu")]
    before, steps = predictors_loss(), []
    for epoch in range(6):
        loader.set_epoch(epoch)
        for labeled, unlabeled in loader.on("cpu"):
            progress = Progress(len(steps), epoch, 36)
            losses = method.losses(Student(model, read_memory=epoch >= 2), labeled, unlabeled, progress)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            method.after_step(Student(model), progress)
            steps.append({key: value.item() for key, value in losses.items()})
    first, last = (sum(step["loss_x"] for step in some) for some in (steps[:6], steps[-6:]))
    assert len(steps) == 36 and last < 0.9 * first
    assert predictors_loss() < 0.85 * before
    assert all(max(step[key] for step in steps) > 0 for key in steps[0])


@everywhere
def test_state_dict_round_trip(name, bottleneck):
    """Student and method after a step, into others that were made from another seed: they go on alike."""
    model, method = attached(name, bottleneck, **learning(name))
    method.losses(Student(model, read_memory=True), *random_batches(method), FIRST)["loss"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
    method.after_step(Student(model), Progress(1, 0, 10))
    other, again = make_model(bottleneck), make_method(name, **learning(name))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    again.attach(other)
    other.load_state_dict(model.state_dict(), strict=True)
    again.load_state_dict(method.state_dict(), strict=True)
    results = []
    for network, trained in ((model, method), (other, again)):
        torch.manual_seed(3)
        losses = trained.losses(Student(network, read_memory=True), *random_batches(method, seed=2), FIRST)
        results.append({key: value.item() for key, value in losses.items()})
    assert results[0] == results[1]
