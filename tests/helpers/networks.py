"""Small networks, methods and random batches."""

from dataclasses import fields
from functools import partial

import torch
from torch import nn

from allspark.config import BottleneckConfig, ModelConfig
from allspark.config_keys import bind_options
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.mit import MiT, MiTSize
from allspark.models.segmentor import ENCODERS, build_model

CROP, CLASSES = 65, 5
FIRST = Progress(step=0, epoch=0, total_steps=10)
ONE = {
    "supervised": "none",
    "selftrain": "none",
    "allspark": "allspark",
}  # other methods have both
CASES = [(name, one) for name in METHODS for one in ([ONE[name]] if name in ONE else ("none", "allspark"))]
WIDTHS = (8, 16, 40, 64)
# One narrow block per stage, for speed
ENCODERS["tiny"] = partial(MiT, MiTSize(WIDTHS, (1, 1, 1, 1), 32))


def make_model(bottleneck="allspark", classes=CLASSES, crop=CROP, **options):
    torch.manual_seed(0)
    cfg = ModelConfig(encoder="tiny", bottleneck=BottleneckConfig(name=bottleneck), **options)
    return build_model(cfg, classes, crop).train()


def freeze_batch_norm(model):
    """Batch norm by its running statistics: no layer looks at other images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def quiet_model(bottleneck="none", seed=None):
    """A network without dropout and drop path; with a seed, its initial weights are perturbed."""
    model = make_model(bottleneck, dropout=0.0, drop_path=0.0)
    if bottleneck == "allspark":
        model.bottleneck.cross_branch.dropout = model.bottleneck.self_branch.dropout = 0.0
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def make_method(name, **options):
    return METHODS[name](CrossEntropy(), **options)


def takes(name, option):
    return option in bind_options(METHODS[name], {}, "method") or option in METHODS[name].spec_fields


def learning(name, **options):
    """Options with which each loss of a method is positive from the first step on."""
    wanted = {"threshold": 0.0, "background": 0, **options}
    return {option: value for option, value in wanted.items() if takes(name, option)}


def attached(name, bottleneck="none", **options):
    """A small network with a method attached, as before the first training step."""
    model, method = make_model(bottleneck), make_method(name, **options)
    method.attach(model)
    return model, method


def random_batches(method, batch_x=2, batch_u=2, size=(CROP, CROP), classes=CLASSES, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def images(batch):
        return torch.randn(batch, 3, *size, generator=generator)

    mask = torch.randint(0, classes, (batch_x, *size), generator=generator)
    boxes = tuple(torch.rand(batch_u, *size, generator=generator) < 0.3 for _ in method.views.strong)
    valid = torch.rand(batch_u, *size, generator=generator) < 0.9
    strong = tuple(images(batch_u) for _ in method.views.strong)
    return LabeledBatch(images(batch_x), mask), UnlabeledBatch(images(batch_u), strong, valid, boxes)


def assert_numbers(losses, model):
    """Every loss and every gradient is finite, and every trainable parameter has one: DDP waits for each."""
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def double(batch):
    """A batch of tensors, or a class of them, with its images in float64."""
    if torch.is_tensor(batch):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, tuple):
        return tuple(map(double, batch))
    return batch and type(batch)(*(double(getattr(batch, field.name)) for field in fields(batch)))


def loop_enqueue(queue, pointer, features, classes):
    """One write at a time: image by image, channels ascending, the ring wraps."""
    slots = queue.shape[1]
    for image, labels in zip(features, classes, strict=True):
        for channel, k in zip(image, labels.tolist(), strict=True):
            queue[k, pointer[k]] = channel
            pointer[k] = (pointer[k] + 1) % slots
