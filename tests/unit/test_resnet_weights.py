"""Weights of ResNets and of DeepLabV3+: recognized by their keys, loaded, refused and fetched."""

import math
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from allspark.__main__ import main
from allspark.inference import load_for_inference, training_crop
from allspark.models.segmentor import ENCODERS
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import WeightFile, load_pretrained, to_our_names
from allspark.weights.mirrors import MIT_LICENSE, license_of, mirrors
from allspark.weights.recognize import infer_architecture, recognize
from helpers.deeplab import CLASSES, TIMM_NAMES, filled, make_model


@pytest.fixture(scope="module")
def shared():
    """A ResNet-50 with the decoder, in evaluation mode. Read it, never change it."""
    return make_model(decoder_channels=16).eval()


@pytest.fixture(scope="module")
def torchvision_net():
    """torchvision's own ResNet-50 with the last stage dilated: what the released UniMatch asks of its copy."""
    return filled(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_torchvision_weights_give_its_maps(torchvision_net, suffix, tmp_path):
    """All four maps with the last stage dilated, three with timm's network as it is, from one file with a classifier.

    The .pth is of the time before batch norm counted its batches.
    """
    file, state = tmp_path / f"resnet50{suffix}", torchvision_net.state_dict()
    if suffix == ".pth":
        torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, file)
    else:
        save_file(state, file)
    model = make_model(decoder_channels=16).eval()
    (said,) = load_pretrained(model, str(file), "none")
    file.unlink()
    assert re.search(r": (265|318) tensors, unused: fc.(weight, fc.bias|bias, fc.weight)", said)
    image, net = torch.randn(1, 3, 65, 97), torchvision_net
    ours, x = model.encoder(image), net.maxpool(net.relu(net.bn1(net.conv1(image))))
    for index, feature in enumerate(ours):
        x = getattr(net, f"layer{index + 1}")(x)
        torch.testing.assert_close(feature, x, rtol=1e-4, atol=1e-5)
    if suffix == ".pth":
        plain = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3)).eval()
        plain.load_state_dict(model.encoder.state_dict(), strict=False)
        for feature, theirs in zip(ours, plain(image), strict=False):
            torch.testing.assert_close(feature, theirs)


def told(state, path="resnet.pth"):
    """What is read off a state_dict with these names."""
    return recognize(WeightFile(path, dict(state), {}))


@pytest.mark.parametrize("prefix", ["", "encoder.", "backbone."])
def test_recognized_by_keys(torchvision_net, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in torchvision_net.state_dict().items()}
    found = told({**state, "segmentation_head.0.weight": torch.zeros(1)})
    assert "ResNet" in found.key_map.title and found.architecture.model.encoder == "resnet50"
    assert found.result.unexpected == [f"{prefix}fc.weight", f"{prefix}fc.bias", "segmentation_head.0.weight"]
    assert torch.equal(found.state()["layer4.2.conv3.weight"], state[f"{prefix}layer4.2.conv3.weight"])


def changed(state, **values):
    return {**state, **{name.replace("__", "."): value for name, value in values.items()}}


def test_damaged_and_foreign_files(torchvision_net):
    state = torchvision_net.state_dict()
    less = {name: tensor for name, tensor in state.items() if name != "layer2.1.bn2.weight"}
    shallow = {name: tensor for name, tensor in state.items() if not name.startswith("layer3.5.")}
    other_stem = {name: tensor for name, tensor in state.items() if name != "conv1.weight"}  # resnet50d: conv1.0, ...
    with torch.device("meta"):
        basic = torchvision.models.resnet18().state_dict()
    for content, words in (
        (less, "1 tensors of this resnet50 are missing: layer2.1.bn2.weight"),
        (changed(state, bn1__bias=torch.full((64,), math.nan)), "bn1.bias .* contains NaN"),
        (changed(state, layer1__0__conv2__weight=torch.zeros(128, 64, 3, 3)), r"layer1.0.conv2.weight has shape \(128"),
        (shallow, "3/4/5/3 blocks deep after a stem of 64, unlike any known encoder .*resnet101 .* 3/4/23/3"),
        (basic, "2/2/2/2 blocks deep after a stem of 64, unlike any known encoder"),
        (other_stem, "tensors of this resnet50 are missing: conv1.weight"),
        (changed(state, bn1__weight=torch.zeros(7)), "a ResNet has a stem of 64 or 128"),
    ):
        with pytest.raises(UserError, match=words):
            told(content).state()


def test_variant_mismatch(torchvision_net, tmp_path):
    torch.save(torchvision_net.state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(UserError, match="another variant"):
        load_pretrained(make_model("resnet50s", decoder_channels=8), str(tmp_path / "resnet50.pth"), "none")
    (tmp_path / "resnet50.pth").unlink()
    with pytest.raises(UserError, match="weights fetch resnet101"):
        load_pretrained(make_model("resnet50s", decoder_channels=8), str(tmp_path / "resnet101.pth"), "none")


@pytest.mark.parametrize(
    ("encoder", "deeper"), [("mit_b1", "mit_b2"), ("resnet50", "resnet101"), ("timm:resnet18", "timm:resnet34")]
)
def test_weights_of_a_deeper_variant(encoder, deeper, tmp_path):
    """Variants that differ in depth alone: the file has all tensors that the network needs, and more."""
    state = make_model(deeper, decoder="mlp", decoder_channels=8).state_dict()
    torch.save({name: value for name, value in state.items() if name.startswith("encoder.")}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "whole.pth")
    model = make_model(encoder, decoder="mlp", decoder_channels=8)
    for files in ((str(tmp_path / "a.pth"), "none"), ("none", str(tmp_path / "whole.pth"))):
        with pytest.raises(UserError, match="is of a deeper network than model.encoder, which has no "):
            load_pretrained(model, *files)


@pytest.mark.parametrize(("decoder", "crop"), [("deeplab", 321), ("mlp", 65), ("mlp_bn", 513)])
def test_whole_model_by_shapes(decoder, crop):
    with torch.device("meta"):
        model = make_model(crop=crop, bottleneck="allspark", decoder=decoder, decoder_channels=24)
    read = infer_architecture(model.state_dict(), "whole.pth", is_model=True)
    assert (read.model.encoder, read.model.decoder, read.model.decoder_channels) == ("resnet50", decoder, 24)
    assert (read.num_classes, read.crop_size) == (CLASSES, crop)
    assert training_crop(520, 513, 16) == 513 and training_crop(530, 513, 16) == 530


def as_unimatch(name):
    """The name that LiheYoung/UniMatch gives to a tensor of ours."""
    for ours, theirs in (
        ("encoder.", "backbone."),
        ("decoder.aspp.pool.", "head.b4.gap."),
        ("decoder.aspp.branches.", "head.b"),
        ("decoder.aspp.project.", "head.project."),
        ("decoder.low.", "reduce."),
        ("decoder.fuse.0.", "fuse."),
        ("decoder.fuse.1.0.", "fuse.3."),
        ("decoder.fuse.1.1.", "fuse.4."),
        ("decoder.classifier.", "classifier."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def test_unimatch_whole_model(shared):
    """Its three 3x3 convolutions and all; another's classifier beside a backbone does not make it one."""
    with torch.device("meta"):
        deep = make_model("resnet101s", decoder_channels=16).state_dict()
    _, found = to_our_names(WeightFile("meta.pth", {as_unimatch(name): tensor for name, tensor in deep.items()}, {}))
    read = infer_architecture(found.tensors, "meta.pth", is_model=True)
    assert (read.model.encoder, read.model.decoder, read.num_classes) == ("resnet101s", "deeplab", CLASSES)
    state = shared.state_dict()
    found = told({as_unimatch(name): tensor for name, tensor in state.items()})
    assert found.key_map.title == "UniMatch, DeepLabV3+" and not found.result.unexpected
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state().items())
    other = {as_unimatch(f"encoder.{name}"): tensor for name, tensor in shared.encoder.state_dict().items()}
    assert told({**other, "classifier.4.weight": torch.zeros(21, 256, 1, 1)}).architecture.num_classes is None


class LiteralImas(torch.nn.Module):
    """iMAS's network (imas/models of ZhenZHAO/iMAS) under its names, its ResNet-50 made from torchvision's."""

    def __init__(self, stride):
        super().__init__()

        def conv(inputs, outputs, kernel, rate=1, bias=False):
            padding = rate * (kernel // 2)
            layer = torch.nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, bias=bias)
            return [layer, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU()]

        net = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, stride == 8, True])
        first, second, (third, *_) = conv(3, 64, 3), conv(64, 64, 3), conv(64, 128, 3)
        first[0].stride = 2
        net.conv1, net.bn1 = torch.nn.Sequential(*first, *second, third), torch.nn.BatchNorm2d(128)
        net.layer1[0].conv1 = torch.nn.Conv2d(128, 64, 1, bias=False)
        net.layer1[0].downsample[0] = torch.nn.Conv2d(128, 256, 1, bias=False)
        net.maxpool.ceil_mode = True
        for block, rate in zip(net.layer4, (4, 8, 16) if stride == 8 else (2, 4, 8), strict=True):
            block.conv2.dilation = block.conv2.padding = (rate, rate)
        del net.fc
        rates = (12, 24, 36) if stride == 8 else (6, 12, 18)
        pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), *conv(2048, 32, 1))
        branches = [conv(2048, 32, 1), *(conv(2048, 32, 3, rate) for rate in rates)]
        aspp = {f"conv{index}": torch.nn.Sequential(*branch) for index, branch in enumerate(branches, 2)}
        last = torch.nn.Conv2d(32, CLASSES, 1)
        self.encoder, self.decoder, self.auxor = net, torch.nn.Module(), torch.nn.ModuleDict({"aux": last})
        self.decoder.aspp = torch.nn.ModuleDict({"conv1": pooled, **aspp})
        self.decoder.low_conv = torch.nn.Sequential(*conv(256, 48, 1, bias=True))
        self.decoder.head = torch.nn.Sequential(*conv(5 * 32, 32, 1))
        last = torch.nn.Conv2d(32, CLASSES, 1)
        self.decoder.classifier = torch.nn.Sequential(*conv(48 + 32, 32, 3), *conv(32, 32, 3), last)

    def forward(self, image):
        def upsampled(x, like):
            size = like.shape[-2:]
            return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)

        net = self.encoder
        fine = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))
        deep = net.layer4(net.layer3(net.layer2(fine)))
        aspp = self.decoder.head(torch.cat([upsampled(branch(deep), deep) for branch in self.decoder.aspp.values()], 1))
        low = self.decoder.low_conv(fine)
        return upsampled(self.decoder.classifier(torch.cat((low, upsampled(aspp, low)), 1)), image)


@pytest.mark.parametrize(("stride", "words"), [(8, []), (16, ["--student"])])
@torch.no_grad()
def test_imas_whole_model(stride, words, tmp_path, capsys):
    """A checkpoint of its training gives the logits of its network, also at even sizes; by default the teacher's."""
    network = filled(LiteralImas(stride))
    torch.nn.init.normal_(network.decoder.low_conv[0].bias)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    other = {name: tensor.new_zeros(()).expand_as(tensor) for name, tensor in state.items()}
    student, teacher = (state, other) if words else (other, state)
    torch.save({"epoch": 3, "model_state": student, "teacher_state": teacher}, tmp_path / "imas.pth")
    call = ["weights", "import", str(tmp_path / "imas.pth"), "--out", str(tmp_path / "ours.pth"), *words]
    if words:
        assert run_main(main, call) == 2 and "give --output-stride 8" in capsys.readouterr().err
    assert run_main(main, [*call, "--output-stride", str(stride)]) == 0
    assert "iMAS, DeepLabV3+" in capsys.readouterr().out
    model = load_for_inference(tmp_path / "ours.pth", torch.device("cpu")).model
    for size in ((65, 97), (70, 64)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(model(image).logits, network(image), rtol=1e-4, atol=1e-4)
    for file in tmp_path.glob("*.pth"):
        file.unlink()


def test_u2pl_is_refused():
    state = {**filled(LiteralImas(16)).state_dict(), "decoder.low_conv.0.weight": torch.zeros(256, 256, 1, 1)}
    with pytest.raises(UserError, match="is a model of U2PL"):
        told(state)


@torch.no_grad()
def test_import_and_inference(shared, tmp_path, capsys):
    """A bare state_dict of a whole network -> a checkpoint that predicts the same."""
    torch.save(shared.state_dict(), tmp_path / "bare.pth")
    assert run_main(main, ["weights", "import", str(tmp_path / "bare.pth"), "--out", str(tmp_path / "ours.pth")]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("AllSpark, this code", "deeplab with 16 channels", "0 missing, 0 unexpected"))
    model = load_for_inference(tmp_path / "ours.pth", torch.device("cpu")).model
    image = torch.randn(1, 3, 70, 65)
    torch.testing.assert_close(model(image).logits, shared(image).logits)
    for file in tmp_path.glob("*.pth"):
        file.unlink()


def test_fetch_from_disk(torchvision_net, tmp_path, capsys):
    torch.save(torchvision_net.state_dict(), tmp_path / "theirs.pth")
    words = ["weights", "fetch", "resnet50", "--from", str(tmp_path / "theirs.pth"), "--out", str(tmp_path / "r50.pth")]
    assert run_main(main, words) == 0
    said = capsys.readouterr().out
    assert "license: BSD 3-Clause" in said and "the classifier of the pretraining: fc.weight, fc.bias" in said
    state = torch.load(tmp_path / "r50.pth", weights_only=True)
    assert state.keys() == ENCODERS["resnet50"](0.0).state_dict().keys()
    for file in tmp_path.glob("*.pth"):
        file.unlink()


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_mirrors(name):
    first, *others = mirrors(name)
    assert others and first.digest and first.digest.removeprefix("sha256:") in first.url
    urls = [mirror.url for mirror in (first, *others)]
    assert all(url.startswith("https://") and name.removesuffix("s") in url for url in urls)
    assert license_of(name) != MIT_LICENSE == license_of("mit_b5")


def test_mirrors_match_torchvision_and_timm():
    """Read again in the packages that are installed: whoever moves a file says so there."""
    for name in ("resnet50", "resnet101"):
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        assert mirrors(name)[0].url == url == timm.get_pretrained_cfg(f"{name}.tv_in1k").url
        assert mirrors(f"{name}s")[0].url == timm.get_pretrained_cfg(f"{name}s.gluon_in1k").url
