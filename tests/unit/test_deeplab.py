"""DeepLabV3+ on dilated ResNets: the model, its recipes, and the supported combinations."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import train
from allspark.__main__ import main
from allspark.build import complete
from allspark.config import OptimConfig
from allspark.config_io import load_recipe
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.engine.optim import build_optimizer
from allspark.losses import CrossEntropy
from allspark.methods import METHODS, Progress
from allspark.models.decoders import DECODERS
from allspark.models.deeplab import DeepLabV3Plus
from allspark.models.mlp_decoder import MLPDecoder
from allspark.models.segmentor import ENCODERS
from allspark.models.student import Student
from allspark.utils.errors import UserError, run_main
from allspark.weights.recognize import find_encoder
from helpers.deeplab import CLASSES, CROP, TIMM_NAMES, filled, make_model

FIRST = Progress(step=0, epoch=0, total_steps=10)


@pytest.fixture(scope="module")
def shared():
    """A ResNet-50 with the decoder, in evaluation mode. Read it, never change it."""
    return make_model(decoder_channels=16).eval()


# The encoder


@pytest.mark.parametrize("size", [(97, 97), (65, 129), (32, 33)])
@torch.no_grad()
def test_sizes(shared, size):
    image = torch.randn(2, 3, *size)
    features, encoder = shared.encoder(image), shared.encoder
    for feature, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (2, channels, *(math.ceil(side / stride) for side in size))
    assert shared(image).logits.shape == (2, CLASSES, *size)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_has_same_settings(name):
    with torch.device("meta"):
        encoder = ENCODERS[name](0.0)
    assert encoder.strides == tuple(encoder.feature_info.reduction()) == (4, 8, 16, 16)
    assert encoder.channels == tuple(encoder.feature_info.channels())
    tensors = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    assert find_encoder(tensors, "file.pth") == name
    dilations = [module.dilation for key, module in encoder.named_modules() if re.fullmatch(r"layer4\.\d\.conv2", key)]
    assert dilations == [(1, 1), (2, 2), (2, 2)]


@torch.no_grad()
def test_multi_grid_with_bottleneck():
    """Crops whose maps are larger than side / stride are refused; others train with a memory."""
    with pytest.raises(UserError, match="set data.crop_size=65"):
        make_model("resnet50s_imas", crop=66, bottleneck="allspark", decoder_channels=8)
    for name in ("resnet50s_imas", "resnet50s_imas_os8"):
        model = make_model(name, crop=65, bottleneck="allspark", decoder_channels=8).eval()
        deepest = model.encoder(torch.randn(1, 3, 65, 65))[-1]
        assert tuple(deepest.shape[-2:]) == tuple(model.bottleneck.memory.size)


def test_drop_path():
    with torch.device("meta"):
        rates = [module.drop_prob for module in ENCODERS["resnet50"](0.2).modules() if isinstance(module, DropPath)]
        assert max(rates) == pytest.approx(0.2)
        assert not any(isinstance(module, DropPath) for module in ENCODERS["resnet50"](0.0).modules())


def test_gradient_checkpointing():
    """Neither gradients nor, though the blocks run twice, the statistics of batch norm, under drop path as well."""
    results, image = [], torch.randn(2, 3, CROP, CROP)
    for checkpointing in (False, True):
        encoder = make_model(drop_path=0.3, checkpointing=checkpointing, decoder_channels=8).encoder
        torch.manual_seed(2)
        sum(feature.square().mean() for feature in encoder(image)).backward()
        results.append([*(p.grad for p in encoder.parameters()), *encoder.buffers()])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


# The decoder


def literal(features, state, rates):
    """DeepLabV3+ spelled out, in evaluation mode; features: finest and deepest."""

    def unit(x, conv, norm, rate=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, padding=rate if weight.shape[-1] == 3 else 0, dilation=rate)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(state[f"{norm}.{name}"] for name in names), eps=1e-5))

    low, deep = features
    branches = [unit(deep, "aspp.branches.0.0", "aspp.branches.0.1")]
    for index, rate in enumerate(rates, 1):
        branches.append(unit(deep, f"aspp.branches.{index}.0", f"aspp.branches.{index}.1", rate))
    pooled = unit(deep.mean((2, 3), keepdim=True), "aspp.pool.1", "aspp.pool.2")
    branches.append(F.interpolate(pooled, deep.shape[2:], mode="bilinear", align_corners=True))
    x = unit(torch.cat(branches, 1), "aspp.project.0", "aspp.project.1")
    x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
    x = torch.cat((unit(low, "low.0", "low.1"), x), 1)
    x = unit(unit(x, "fuse.0.0", "fuse.0.1"), "fuse.1.0", "fuse.1.1")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize(("deepest", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
@torch.no_grad()
def test_decoder_literal(deepest, rates):
    decoder = filled(DeepLabV3Plus((12, 14, 18, 20), CLASSES, 16, strides=(4, 8, 16, deepest)))
    low, deep = torch.randn(2, 12, 45, 49), torch.randn(2, 20, 40, 41)  # deep: the largest dilation reaches into it
    logits = decoder([low, torch.empty(0), torch.empty(0), deep])  # the maps between are not looked at
    torch.testing.assert_close(logits, literal((low, deep), decoder.state_dict(), rates), rtol=1e-4, atol=1e-5)
    assert decoder.low[0].out_channels == 48


@torch.no_grad()
def test_logit_resizing(shared):
    image = torch.randn(1, 3, 65, 70)
    for model, corners in ((shared, True), (make_model("mit_b0", decoder="mlp").eval(), False)):
        logits = F.interpolate(model.decoder(model.encoder(image)), (65, 70), mode="bilinear", align_corners=corners)
        torch.testing.assert_close(model(image).logits, logits)


def test_single_image_trains():
    """Its pooled branch has one value per channel: normalized by the running statistics, which stay as they are."""
    pool = DeepLabV3Plus((8, 8, 8, 8), CLASSES, 16).aspp.pool.train()
    norm, x = filled(pool)[2], torch.randn(2, 8, 3, 3)
    pool.train()
    mean = norm.running_mean.clone()
    single = pool(x[:1])
    assert torch.equal(norm.running_mean, mean)
    torch.testing.assert_close(single, pool.eval()(x[:1]))
    pool.train()(x)
    assert not torch.equal(norm.running_mean, mean)


# Together with methods


def random_batches(method, batch, size=(CROP, CROP)):
    generator = torch.Generator().manual_seed(1)

    def images():
        return torch.randn(batch, 3, *size, generator=generator)

    mask = torch.randint(0, CLASSES, (batch, *size), generator=generator)
    boxes = tuple(torch.rand(batch, *size, generator=generator) < 0.3 for _ in method.views.strong)
    valid = torch.rand(batch, *size, generator=generator) < 0.9
    strong = tuple(images() for _ in method.views.strong)
    return LabeledBatch(images(), mask), UnlabeledBatch(images(), strong, valid, boxes)


def step(name, batch, bottleneck="none"):
    model = make_model(bottleneck=bottleneck, decoder_channels=16)
    method = METHODS[name](CrossEntropy(), **({"threshold": 0.0} if name != "pseudoseg" else {}))
    method.attach(model)
    losses = method.losses(Student(model), *random_batches(method, batch), FIRST)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    return model


@pytest.mark.parametrize(("name", "batch"), [("unimatch", 2), ("fixmatch", 1), ("imas", 2), ("pseudoseg", 1)])
def test_every_parameter_gets_gradient(name, batch):
    step(name, batch)


def test_bottleneck_on_resnet():
    """Its memory has a cell for each of the deepest map, which is of stride 16."""
    model = step("fixmatch", 1, "allspark")
    assert model.bottleneck.memory.size == (CROP // 16,) * 2
    assert model.bottleneck.memory.filled.sum() == 2048
    with torch.device("meta"):
        for crop, encoder, side in ((65, "resnet50", 5), (321, "resnet101", 21), (513, "resnet50s", 33)):
            assert make_model(encoder, crop, "allspark").bottleneck.memory.size == (side, side)


def test_loss_falls():
    model, method = make_model(decoder_channels=16), METHODS["supervised"](CrossEntropy())
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-3, lr_multi=1.0), model)
    mask = torch.arange(CLASSES).repeat_interleave(CROP // CLASSES).expand(2, CROP, CROP)
    labeled = LabeledBatch(torch.randn(2, 3, CROP, CROP) / 4 + mask[:, None], mask)
    losses = []
    for _ in range(4):
        loss = method.supervised_losses(Student(model), labeled)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses


# Which encoder goes with which decoder


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ["mit_b0", "resnet50"])
def test_supported_combinations(encoder, decoder):
    refused = {  # what the message says
        ("mit_b0", "deeplab"): ("stride 8 or 16", "4/8/16/32", "mlp or mlp_bn", "model.encoder=resnet101"),
        ("mit_b0", "dpt"): ("a plain ViT", "4/8/16/32", "mlp or mlp_bn", "model.encoder=dinov2_small"),
        ("resnet50", "dpt"): ("a plain ViT", "4/8/16/16", "mlp or mlp_bn or deeplab", "model.encoder=dinov2_small"),
    }
    if words := refused.get((encoder, decoder)):
        with pytest.raises(UserError) as refusal:
            make_model(encoder, decoder=decoder)
        for word in (f"model.decoder={decoder}", f"model.encoder={encoder}", *words):
            assert word in str(refusal.value)
        return
    model = make_model(encoder, decoder=decoder, decoder_channels=16).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 65)).logits.shape == (1, CLASSES, 33, 65)


@pytest.mark.parametrize("strides", [(2, 4, 8, 16), (4, 8, 16, 32), (8, 8, 8, 8)])
def test_unpublished_strides_are_refused(strides):
    assert "stride 4" in DeepLabV3Plus.unsupported(strides) and MLPDecoder.unsupported(strides) is None
    assert DeepLabV3Plus.unsupported((4, 8, 8, 8)) is None


def test_refusal_precedes_training(place, capsys):
    words = place.train("model.decoder=deeplab")
    assert run_main(train.main, words) == 2
    assert "model.encoder=mit_b0" in capsys.readouterr().err
    assert not place.run.exists()
    assert run_main(main, ["check", "--config", str(place.config), "model.decoder=deeplab"]) == 2
    assert "model.encoder=mit_b0" in capsys.readouterr().err


# Recipes

PUBLISHED = {  # crop, epochs, global batch, lr, factor of the head, weight decay, criterion and its min_kept, threshold
    ("unimatch", "pascal"): (321, 80, 8, 0.001, 10, 1e-4, "ce", None, 0.95),
    ("unimatch", "cityscapes"): (801, 240, 8, 0.005, 1, 1e-4, "ohem", 200_000, 0.0),
    ("unimatch", "coco"): (513, 30, 8, 0.004, 10, 1e-4, "ce", None, 0.95),
    ("fixmatch", "pascal"): (321, 80, 8, 0.001, 10, 1e-4, "ce", None, 0.95),
    ("fixmatch", "cityscapes"): (801, 240, 8, 0.005, 1, 1e-4, "ohem", 200_000, 0.0),
    ("fixmatch", "coco"): (513, 30, 8, 0.004, 10, 1e-4, "ce", None, 0.95),
    ("supervised", "pascal"): (321, 80, 16, 0.001, 10, 1e-4, "ce", None, None),
    ("supervised", "cityscapes"): (801, 240, 16, 0.005, 1, 1e-4, "ohem", 200_000, None),
    ("supervised", "coco"): (513, 30, 16, 0.004, 10, 1e-4, "ce", None, None),
    ("imas", "pascal"): (513, 80, 16, 0.001, 10, 1e-4, "ce", None, 0.95),
    ("imas", "cityscapes"): (769, 240, 16, 0.01, 1, 5e-4, "ohem", 100_000, 0.7),
    ("imas", "coco"): (513, 30, 16, 0.004, 10, 1e-4, "ce", None, 0.95),  # ours
}


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(("method", "dataset"), PUBLISHED)
def test_published_recipe(method, dataset, depth):
    recipe = complete(load_recipe(dataset, f"{method}_r{depth}"))
    crop, epochs, batch, lr, factor, decay, criterion, min_kept, threshold = PUBLISHED[method, dataset]
    assert (recipe.data.crop_size, recipe.epochs, recipe.batch_size) == (crop, epochs, batch)
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.lr_multi, optim.weight_decay) == ("sgd", lr, factor, decay)
    assert (optim.momentum, optim.power, optim.lr_one_step_late) == (0.9, 0.9, method != "imas")
    assert recipe.criterion.name == criterion and min_kept in (None, recipe.criterion.min_kept)
    assert recipe.method.name == method and recipe.method.options.get("threshold") == threshold
    assert recipe.method.options.get("labeled_view", "weak") == "weak"
    assert recipe.epoch_of == ("labeled" if method == "supervised" else "unlabeled")
    model, encoder = recipe.model, f"resnet{depth}s{'_imas' if method == 'imas' else ''}"
    assert (model.encoder, model.decoder, model.drop_path, model.dropout) == (encoder, "deeplab", 0, 0)
    assert model.pretrained == f"pretrained_weights/resnet{depth}s.pth" and model.bottleneck.name == "none"


@pytest.mark.parametrize("dataset", ["camvid", "shapes"])
@pytest.mark.parametrize("name", ["unimatch_r50", "fixmatch_r101", "supervised_r50", "imas_r101"])
def test_small_datasets_start_from_scratch(name, dataset):
    recipe = complete(load_recipe(dataset, name))
    assert recipe.model.pretrained == "none" and recipe.model.decoder == "deeplab" and recipe.optim.name == "adamw"
