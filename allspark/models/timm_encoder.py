"""Encoders from timm by `model.encoder=timm:NAME`: networks with a feature pyramid, and plain ViTs that get one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from allspark.models.mlp_decoder import cover
from allspark.utils.errors import UserError, reason_of

PREFIX = "timm:"
LEVELS = 4
PYRAMID_CHANNELS = 256  # of ViTDet (arXiv 2203.16527)


class TimmEncoder(nn.Module):
    """image (B, 3, H, W) -> four maps (B, C_i, H' / s_i, W' / s_i), finest first, at the strides s_i.

    H' and W' are H and W rounded up to a `multiple` of the deepest stride: the image is padded with the mean colour at
    the bottom and on the right, since these networks drop what does not fill a cell; Segmentor cuts it off the logits.
    body: timm's network under timm's names; pyramid: what a plain ViT is given, fresh at the start of a training.
    """

    decoder_channels = 256

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        super().__init__()
        self.name = name
        self.body, self.options = create_body(name, drop_path)
        widths, strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        self.pyramid = None
        if len(set(strides)) == 1:
            self.pyramid = SimplePyramid(widths[-1])
            widths, strides = [PYRAMID_CHANNELS] * LEVELS, SimplePyramid.strides(strides[-1])
        self.channels, self.strides = tuple(widths[-LEVELS:]), tuple(strides[-LEVELS:])
        if len(strides) < LEVELS or sorted({*self.strides}) != [*self.strides]:
            raise unsuitable(
                name, f"its maps have strides {'/'.join(map(str, strides))}, and {LEVELS} levels are needed"
            )
        self.multiple = self.strides[-1]
        # Images come normalized with ImageNet's mean and deviation; some of timm's weights want others
        mean, std = (torch.tensor(self.body.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        ours_mean, ours_std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.register_buffer("scale", ours_std / std, persistent=False)
        self.register_buffer("shift", (ours_mean - mean) / std, persistent=False)
        self.check_maps()

    @torch.no_grad()
    def check_maps(self) -> None:
        """UserError for a network of one image size, or whose maps are not what it says: seen on a small image."""
        height, width = 2 * self.multiple, 3 * self.multiple
        self.eval()
        try:
            shapes = [tuple(feature.shape[1:]) for feature in self(torch.zeros(1, 3, height, width))]
        except Exception as error:  # each network says in its own way that it takes one size alone
            raise unsuitable(self.name, f"it does not take images of any size ({reason_of(error)})") from error
        self.train()
        cells = [(int(height / stride), int(width / stride)) for stride in self.strides]
        if shapes != [(channels, *size) for channels, size in zip(self.channels, cells, strict=True)]:
            raise unsuitable(
                self.name, f"its maps of {height} x {width} pixels are {shapes}, which its strides do not tell"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own, by stage or block."""
        if not enable:
            return
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.body.modules()):
            raise UserError(
                f"model.checkpointing=true with model.encoder={PREFIX}{self.name}: its batch norm would count every "
                "batch twice; set model.checkpointing=false, or choose an encoder without batch norm"
            )
        network = self.body if hasattr(self.body, "set_grad_checkpointing") else getattr(self.body, "model", self.body)
        if not hasattr(network, "set_grad_checkpointing"):
            raise UserError(
                f"model.checkpointing=true with model.encoder={PREFIX}{self.name}: timm has none for it; set "
                "model.checkpointing=false"
            )
        network.set_grad_checkpointing(True)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.body(cover(image, self.multiple) * self.scale + self.shift)[-LEVELS:]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return features if self.pyramid is None else self.pyramid(features[-1])

    def way_to_weights(self) -> str:
        """How to get the file that timm would, which nothing here downloads unasked; empty: timm knows of none."""
        place = f"timm/{self.name}" if "." in self.name else self.body.pretrained_cfg.get("hf_hub_id")
        folder = f"pretrained_weights/{self.name}"
        command = f"hf download {place} model.safetensors --local-dir {folder}"
        return f"get it by `{command}` and set model.pretrained={folder}/model.safetensors" if place else ""

    def check_file(self, path: Path) -> None:
        """UserError, with the way to get one, where there is no file of weights."""
        if not path.exists():
            way = "; ".join(filter(None, ["give its path, or 'none' to start without one", self.way_to_weights()]))
            raise UserError(f"{path}: no such weight file; {way}")

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint of timm, or of one that timm converts, under the names of this module."""
        import timm

        network = timm.create_model(self.name, num_classes=0, **self.options)
        convert = getattr(sys.modules[timm.model_entrypoint(self.name).__module__], "checkpoint_filter_fn", None)
        if convert is not None:  # timm's convention: file -> its names, position embeddings in this network's size
            tensors = convert(dict(tensors), network)
        ours = {plain(name): f"body.{name}" for name in self.body.state_dict()}
        return {ours.get(plain(name), name): tensor for name, tensor in tensors.items()}


class SimplePyramid(nn.Module):
    """The last map (B, C, h, w) of a plain ViT, h and w even -> four maps of 256 channels (ViTDet, section 3).

    Up by deconvolutions to 4 and 2 times its size, as it is, and down to a half by max pooling; on each a 1x1 and a 3x3
    convolution with LayerNorm. norm: ours, takes the place of the ViT's last one, whose output grows without it.
    """

    def __init__(self, channels: int) -> None:
        from timm.layers import LayerNorm2d

        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.norm = LayerNorm2d(channels)
        finest = (up(channels, half), LayerNorm2d(half), nn.GELU(), up(half, quarter))
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(width, PYRAMID_CHANNELS, 1, bias=False),
                LayerNorm2d(PYRAMID_CHANNELS),
                nn.Conv2d(PYRAMID_CHANNELS, PYRAMID_CHANNELS, 3, padding=1, bias=False),
                LayerNorm2d(PYRAMID_CHANNELS),
            )
            for width, layers in (
                (quarter, finest),
                (half, (up(channels, half),)),
                (channels, ()),
                (channels, (nn.MaxPool2d(2),)),
            )
        )

    @staticmethod
    def strides(patch: int) -> tuple[float, ...]:
        """Of the four maps; those of patches of 14 pixels are 3.5, 7, 14 and 28."""
        return tuple(stride if stride % 1 else int(stride) for stride in (patch / 4, patch / 2, patch, 2 * patch))

    def forward(self, feature: Tensor) -> list[Tensor]:
        feature = self.norm(feature)
        return [level(feature) for level in self.levels]


def up(in_channels: int, channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, channels, 2, stride=2)


def create_body(name: str, drop_path: float) -> tuple[nn.Module, dict[str, object]]:
    """timm's network for features with fresh weights, and those of our options that it takes."""
    import timm  # takes as long to import as torch

    if not timm.is_model(name):  # which hf-hub:... and local-dir:... are not either: nothing is fetched
        raise UserError(f"model.encoder={PREFIX}{name}: timm {timm.__version__} has no such model; {alike(name)}")
    options = {"drop_path_rate": drop_path, "dynamic_img_size": True}  # position embeddings of any size of an image
    while True:
        try:
            return timm.create_model(name, features_only=True, **options), options
        except TypeError as error:
            kept = {key: value for key, value in options.items() if key not in str(error)}  # it names what it refuses
            if kept == options:
                raise
            options = kept
        except Exception as error:  # what a network lacks it says in its own way
            raise unsuitable(name, f"timm gives no features of it ({reason_of(error)})") from error


def alike(name: str) -> str:
    import timm

    architecture = name.partition(".")[0]
    close = difflib.get_close_matches(architecture, timm.list_models(), 4) or timm.list_models(f"*{architecture}*")[:4]
    return f"did you mean {' or '.join(PREFIX + other for other in close)}?" if close else GOOD


def unsuitable(name: str, why: str) -> UserError:
    return UserError(f"model.encoder={PREFIX}{name}: cannot be an encoder here: {why}; {GOOD}")


GOOD = (
    "take a network with a feature pyramid, such as timm:convnext_tiny, timm:swin_tiny_patch4_window7_224 or "
    "timm:efficientnet_b0, or a plain ViT, such as timm:vit_small_patch14_dinov2 (timm.list_models() has the names)"
)


def plain(name: str) -> str:
    """A name of timm without what its networks for features make of it: `_` for some `.`, below `model.` or not."""
    return name.removeprefix("model.").replace(".", "_")
