"""The benchmark: its plain implementation equals the real code, and its measurements are right."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from allspark.arguments import parse
from allspark.bench import measure, parts, scale
from allspark.bench.loader import Stream
from allspark.bench.photos import Likeness, write_photos
from allspark.bench.plain import (
    PlainStream,
    plain_copy,
    plain_counts,
    plain_label,
    plain_optimizer,
    plain_sliding,
    plain_step,
)
from allspark.bench.step import StepBatch, StepCase, our_side
from allspark.cli import bench
from allspark.config import BottleneckConfig, DataConfig, ModelConfig, OptimConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views, normalize
from allspark.data.datasets import spec_for
from allspark.data.loaders import LABELED, UNLABELED, TrainPairs
from allspark.data.spec import IGNORE_INDEX, IMAGENET, Sample
from allspark.data.splits import Lists
from allspark.engine.optim import build_optimizer
from allspark.engine.stepper import Stepper
from allspark.evaluation.evaluate import predict
from allspark.evaluation.metrics import ConfusionMatrix
from allspark.evaluation.sliding_window import Inference
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.segmentor import build_model
from allspark.models.student import Student

CLASSES, CROP = 5, 65
PARTS = {"encoder", "bottleneck", "decoder", "optimizer", "other"}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def networks():
    """Ours and the plain one with its weights, without dropout, and the config."""
    torch.manual_seed(0)
    bottleneck = BottleneckConfig(name="allspark", dropout=0.0)
    cfg = ModelConfig(encoder="mit_b0", drop_path=0.0, dropout=0.0, bottleneck=bottleneck)
    model = build_model(cfg, CLASSES, CROP)
    with torch.no_grad():  # so that the classes differ, and statistics are not 0 and 1
        model.decoder.classifier.weight.normal_()
        model.decoder.fuse.bn.running_mean.normal_(std=0.1)
    return model, plain_copy(model, cfg)


def test_parts_of_a_step(networks):
    """The parts add up to the step, its time is in the part that takes it, and no hook remains."""
    case = StepCase(crop=CROP, classes=CLASSES)
    side = our_side(case, networks[0], "fp32", StepBatch.of(case, CPU))
    slow = side.model.decoder.classifier.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    hooks = len(side.model.decoder._forward_pre_hooks), len(side.model.encoder._forward_hooks)
    shares = parts.step_parts(side, CPU)
    assert shares.keys() == PARTS and sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == "decoder"
    assert (len(side.model.decoder._forward_pre_hooks), len(side.model.encoder._forward_hooks)) == hooks
    slow.remove()
    operators = parts.largest_operators(side, CPU)
    assert len(operators) == parts.OPERATORS and all(0 < share < 1 for share in operators.values())


def test_same_step(networks):
    """Two of them: the second one sees the memory, the statistics and the momentum that the first one left."""
    model, plain = networks
    cfg = OptimConfig()
    optimizer, stepper = plain_optimizer(cfg, plain), Stepper(model, build_optimizer(cfg, model))
    method = METHODS["allspark"](CrossEntropy())
    logits = []
    model.register_forward_hook(lambda module, args, output: logits.append(output.logits.detach()))
    plain.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    gradients = {}
    for name, parameter in model.named_parameters():  # a step lets go of them
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    for step in range(2):
        torch.manual_seed(step)
        image_x, image_u = torch.randn(2, 2, 3, CROP, CROP)
        mask = torch.randint(CLASSES, (2, CROP, CROP))
        mask[:, :9] = IGNORE_INDEX
        unlabeled = UnlabeledBatch(image_u, (), torch.ones_like(mask, dtype=torch.bool), ())
        model.train()
        losses = method.losses(
            Student(model, read_memory=True), LabeledBatch(image_x, mask), unlabeled, Progress(step, 0, 2)
        )
        stepper.optimizer.param_groups[1]["lr"] = cfg.lr * cfg.lr_multi
        stepper.backward(losses["loss"])
        stepper.step()
        assert plain_step(plain, optimizer, image_x, mask, image_u) == pytest.approx(losses["loss"].item(), rel=1e-5)

        for ours, theirs in zip(logits[:2], logits[2:], strict=True):  # of the pseudo-label pass, of the joint pass
            assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
        assert not torch.equal(logits[0], logits[0].roll(1, 0))
        logits.clear()
        named, largest = dict(plain.named_parameters()), max(gradient.abs().max() for gradient in gradients.values())
        for name, parameter in model.named_parameters():
            bound = 1e-4 * gradients[name].abs().max() + 1e-6 * largest  # before a batch norm biases have gradient 0
            assert (gradients[name] - named[name].grad).abs().max() <= bound, name
            assert torch.allclose(parameter, named[name], atol=1e-5), name
        memory = plain.bottleneck.memory
        assert torch.equal(model.bottleneck.memory.pointer, memory.pointer)
        assert torch.allclose(model.bottleneck.memory.queue, memory.queue, atol=1e-4)
        assert memory.pointer.count_nonzero() > 1


def test_same_evaluation(networks):
    model, plain = networks
    spec = bench.EvalCase(classes=CLASSES).spec
    image = torch.randint(0, 256, (1, 3, 80, 100), dtype=torch.uint8)
    model.eval(), plain.eval()
    with torch.no_grad():
        ours, theirs = model(normalize(image)).logits, plain(normalize(image))
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    label = predict(model, image, spec, CPU, Inference(), ["name"])
    assert (label != plain_label(plain, normalize(image))).sum() < 5  # ties
    windows = predict(model, image, spec, CPU, Inference("sliding_window", 64), ["name"])
    assert (windows != plain_sliding(plain, normalize(image), 64, CLASSES)).sum() < 5
    assert len(windows.unique()) > 1 and not torch.equal(windows, label)


def test_same_counts():
    rng = np.random.default_rng(0)
    prediction, mask = rng.integers(0, CLASSES, (2, 40, 50))
    mask[:7] = IGNORE_INDEX
    confusion = ConfusionMatrix(CLASSES, IGNORE_INDEX)
    confusion.update(torch.from_numpy(prediction), torch.from_numpy(mask))
    matrix = confusion.matrix
    counts = plain_counts(prediction, mask, CLASSES, IGNORE_INDEX)
    for ours, theirs in zip((matrix.diagonal(), matrix.sum(0), matrix.sum(1)), counts, strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Lists of eight small pictures, their specification and the recipe's section."""
    folder = tmp_path_factory.mktemp("bench")
    data = DataConfig(dataset="pascal", data_root=str(folder), crop_size=CROP, photometric="pil")
    spec = spec_for(data)
    samples = tuple(write_photos(folder / "files", Likeness("pascal", (90, 70), CROP, ".jpg", 5.0, 8), spec, 8))
    return Lists(samples, tuple(Sample(sample.image) for sample in samples), (), "", "bench"), spec, data


@pytest.mark.parametrize("stream", [LABELED, UNLABELED])
def test_same_data_path(files, stream):
    lists, spec, data = files
    samples = (lists.labeled, lists.unlabeled)[stream]
    ours = Stream(TrainPairs(lists, spec, data, Views(), seed=0), stream)
    plain = PlainStream(samples, spec, data, 0, stream, strong=False)
    padded = 0
    for index in range(len(samples)):
        (view, mask), (plain_view, plain_mask) = ours[index], plain[index]
        assert torch.equal(mask.to(plain_mask.dtype), plain_mask)
        assert gray_levels(view, plain_view).max() <= 2.01
        padded += (~mask if stream == UNLABELED else mask == IGNORE_INDEX).sum()
    assert padded > 0


def test_same_strong_view(files):
    lists, spec, data = files
    ours = Stream(TrainPairs(lists, spec, data, Views("strong"), seed=0), LABELED)
    weak = PlainStream(lists.labeled, spec, data, 0, LABELED, strong=False)
    plain = PlainStream(lists.labeled, spec, data, 0, LABELED, strong=True)
    for index in range(len(lists.labeled)):
        assert gray_levels(ours[index][0], plain[index][0]).mean() < 1  # a hue moves far by one gray level
    assert max(gray_levels(ours[index][0], weak[index][0]).mean() for index in range(8)) > 10


def gray_levels(view, plain_view):
    return (normalize(view) - plain_view).abs() * 255 * torch.tensor(IMAGENET.std)[:, None, None]


def test_depthwise_convolution_flops():
    conv = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    x = torch.randn(1, 16, 10, 10, requires_grad=True)
    work = measure.count_work(measure.Side("conv", lambda: conv(x).sum().backward()), CPU)
    assert work.flops == 3 * 2 * 16 * 10 * 10 * 9  # forward, and the gradients of input and weight
    assert work.moved_bytes > 3 * 4 * 1600


def test_peak_of_live_tensors():
    kept = torch.ones(1000)  # float32: what was there before does not count, in-place work and views neither

    def run():
        total = kept.mul_(1) * 2
        for _ in range(3):
            total = F.gelu(total)  # two at a time
        return total.view(10, 100).add_(1)

    work = measure.count_work(measure.Side("run", run), CPU)
    assert work.peak_bytes == 2 * 4000
    assert work.moved_bytes == 4000 * 2 * (1 + 1 + 3 + 1)


def test_points_are_measurable_steps():
    for point in scale.points(list(scale.SWEEPS)):
        words = point.command(["--precision", "fp32", "--repeats", "1"], threads=2)
        args = parse("bench", words[words.index("bench") + 1 :])
        bench.set_defaults(args)
        assert getattr(args, point.vary, point.value) == point.value
        several = point == scale.Point("processes", 2)
        assert ("torch.distributed.run" in words) == several and args.threads == (1 if several else 2)
