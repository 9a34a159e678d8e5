"""SegFormer as in mmsegmentation, written with torch's modules under its names, against the imported model.

Its encoder has one matrix for q, k and v, and convolutions as feed-forward layers. Its decode head is another one than
the original: batch norm and ReLU per level, and the levels are concatenated from the finest on.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allspark.__main__ import main
from allspark.config import ModelConfig
from allspark.models import mit
from allspark.models.mlp_decoder import MLPBNDecoder
from allspark.models.segmentor import build_model
from allspark.utils.errors import UserError, run_main
from allspark.weights.loading import init_from
from helpers.parity import filled, same_maps

CLASSES, WIDTH = 5, 48


class Attention(nn.Module):
    def __init__(self, width, heads, reduction):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):  # (B, C, H, W)
        query = x.flatten(2).transpose(1, 2)
        key = self.norm(self.sr(x).flatten(2).transpose(1, 2)) if hasattr(self, "sr") else query
        out = self.attn(query, key, key, need_weights=False)[0]
        return out.transpose(1, 2).reshape(x.shape)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = 4 * width
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        convs = (nn.Conv2d(width, hidden, 1), depthwise, nn.GELU(), nn.Dropout(0), nn.Conv2d(hidden, width, 1))
        self.layers = nn.Sequential(*convs)

    def forward(self, x):
        return self.layers(x)


class Layer(nn.Module):
    def __init__(self, width, heads, reduction):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.ffn = Attention(width, heads, reduction), FeedForward(width)

    def forward(self, x):
        x = x + self.attn(over_channels(self.norm1, x))
        return x + self.ffn(over_channels(self.norm2, x))


class PatchEmbed(nn.Module):
    def __init__(self, inputs, width, size, stride):
        super().__init__()
        self.projection = nn.Conv2d(inputs, width, size, stride, size // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        return over_channels(self.norm, self.projection(x))


class Backbone(nn.Module):
    def __init__(self, size):
        super().__init__()
        stages = []
        for index, (width, depth) in enumerate(zip(size.channels, size.depths, strict=True)):
            embed = PatchEmbed((3, *size.channels)[index], width, *((7, 4) if index == 0 else (3, 2)))
            blocks = (Layer(width, (1, 2, 5, 8)[index], (8, 4, 2, 1)[index]) for _ in range(depth))
            stages.append(nn.ModuleList((embed, nn.ModuleList(blocks), nn.LayerNorm(width, eps=1e-6))))
        self.layers = nn.ModuleList(stages)

    def forward(self, x):
        maps = []
        for embed, blocks, norm in self.layers:
            x = embed(x)
            for block in blocks:
                x = block(x)
            x = over_channels(norm, x)
            maps.append(x)
        return maps


class DecodeHead(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.convs = nn.ModuleList(conv_bn(width, WIDTH) for width in widths)
        self.fusion_conv = conv_bn(len(widths) * WIDTH, WIDTH)
        self.conv_seg = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, maps):
        size = maps[0].shape[2:]
        levels = [bn_relu(module, x) for module, x in zip(self.convs, maps, strict=True)]
        levels = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels]
        return self.conv_seg(bn_relu(self.fusion_conv, torch.cat(levels, 1)))


class SegFormer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.backbone, self.decode_head = Backbone(size), DecodeHead(size.channels)

    def forward(self, x):
        logits = self.decode_head(self.backbone(x))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)


def over_channels(norm, x):
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_bn(inputs, outputs):
    return nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 1, bias=False), "bn": nn.BatchNorm2d(outputs)})


def bn_relu(module, x):
    return F.relu(module["bn"](module["conv"](x)))


@pytest.fixture(scope="module")
def theirs():
    return filled(SegFormer(mit.SIZES["mit_b0"]))


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_whole_model(theirs, image, tmp_path, capsys):
    meta = {"CLASSES": ("a", "b"), "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": theirs.state_dict()}, tmp_path / "segformer.pth")
    words = ["weights", "import", str(tmp_path / "segformer.pth"), "--out", str(tmp_path / "ours.pth")]
    assert run_main(main, words) == 0
    assert "mmsegmentation" in (said := capsys.readouterr().out) and " 0 missing, 0 unexpected" in said
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    architecture = content["architecture"]
    assert architecture["num_classes"] == CLASSES and architecture["crop_size"] is None
    assert (architecture["model"]["decoder"], architecture["model"]["decoder_channels"]) == ("mlp_bn", WIDTH)
    model = build_model(ModelConfig(encoder="mit_b0", decoder="mlp_bn", decoder_channels=WIDTH), CLASSES, 65)
    model.load_state_dict(content["model"], strict=True)
    same_maps([model.eval()(image).logits], [theirs(image)])


def test_whole_model_needs_its_decoder(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "segformer.pth")
    cfg = ModelConfig(encoder="mit_b0", decoder_channels=WIDTH)
    with pytest.raises(UserError, match=r"does not fit this model.*decoder\.linears.*decoder and decoder_channels"):
        init_from(build_model(cfg, 3, 65), tmp_path / "segformer.pth")
    model = build_model(replace(cfg, decoder="mlp_bn"), 3, 65)
    assert "newly initialized: decoder.classifier" in init_from(model, tmp_path / "segformer.pth")
    assert torch.equal(model.decoder.fuse.conv.weight, theirs.decode_head.fusion_conv["conv"].weight)


@torch.no_grad()
def test_encoder_only(theirs, image, tmp_path):
    """The pretraining files have no prefix."""
    torch.save(theirs.backbone.state_dict(), tmp_path / "mit_b0.pth")
    words = ["weights", "import", str(tmp_path / "mit_b0.pth"), "--out", str(tmp_path / "ours.pth")]
    assert run_main(main, words) == 0
    encoder = mit.MiT(mit.SIZES["mit_b0"]).eval()
    encoder.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    same_maps(encoder(image), theirs.backbone(image))


@torch.no_grad()
def test_decoder_in_training(image):
    """Batch statistics of every level, not running ones; without dropout, which is random."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((16, 24), (8, 12), (4, 6), (2, 3))
    maps = [
        torch.randn(2, c, *size, generator=generator)
        for c, size in zip(mit.SIZES["mit_b0"].channels, sizes, strict=True)
    ]
    theirs = filled(DecodeHead(mit.SIZES["mit_b0"].channels)).train()
    ours = MLPBNDecoder(mit.SIZES["mit_b0"].channels, CLASSES, WIDTH, dropout=0.0).train()
    renamed = (("fusion_conv", "fuse"), ("conv_seg", "classifier"))
    state = theirs.state_dict()
    for old, new in renamed:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    ours.load_state_dict(state, strict=True)
    same_maps([ours(maps)], [theirs(maps)])
    same_maps([ours.convs[3].bn.running_var], [theirs.convs[3]["bn"].running_var])
