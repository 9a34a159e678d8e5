"""Encoders from timm, `model.encoder=timm:NAME`: networks with a feature pyramid, and plain ViTs; and DINOv2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn

from allspark.models.dpt import dpt_sizes
from allspark.models.resize import pad_to_multiple
from allspark.utils.errors import UserError, reason_of

PREFIX = "timm:"
LEVELS = 4
PYRAMID_CHANNELS = 256  # of ViTDet (arXiv 2203.16527)


class TimmEncoder(nn.Module):
    """image (B, C, H, W) -> four maps (B, C_i, H' / s_i, W' / s_i), finest first, of strides s_i.

    H' and W' are H and W rounded up to a multiple of the deepest stride: the image is padded with the mean color at the
    bottom and on the right, because these networks drop incomplete cells. Segmentor cuts the padding off the logits.

    Args:
        name: timm's name of the model.
        drop_path: rate, for networks that have it.
        tokens: a plain ViT returns four of its layers, normalized and of one stride, instead of a pyramid.

    Attributes:
        body: timm's network, with timm's names in the state_dict.
        pyramid: SimplePyramid for a plain ViT, never pretrained; else None.
        is_vit: whether it is a plain ViT, whose last map has token_channels channels and the stride token_stride.
        multiple: the sides of images are padded to multiples of this.
    """

    decoder_channels = 256

    def __init__(self, name: str, drop_path: float = 0.0, tokens: bool = False) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        super().__init__()
        self.name = name
        self.body, self.options = create_body(name, drop_path, tokens)
        widths, strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        self.pyramid = None
        self.is_vit = len(set(strides)) == 1
        self.token_channels, self.token_stride = widths[-1], strides[-1]
        if self.is_vit and tokens:
            self.decoder_channels = dpt_sizes(widths[-1])[0]
        elif self.is_vit:
            self.pyramid = SimplePyramid(widths[-1])
            widths, strides = [PYRAMID_CHANNELS] * LEVELS, SimplePyramid.strides(strides[-1])
        self.channels, self.strides = tuple(widths[-LEVELS:]), tuple(strides[-LEVELS:])
        if len(strides) < LEVELS or not (self.is_vit or sorted({*self.strides}) == [*self.strides]):
            raise unsuitable_error(
                name, f"its maps have strides {'/'.join(map(str, strides))}, and {LEVELS} levels are needed"
            )
        self.multiple = self.strides[-1]
        norms = nn.modules.batchnorm._BatchNorm
        self.has_batch_norm = any(isinstance(module, norms) for module in self.body.modules())
        # Images are normalized with ImageNet's mean and standard deviation; some of timm's weights expect others
        mean, std = (torch.tensor(self.body.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        our_mean, our_std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.register_buffer("scale", our_std / std, persistent=False)
        self.register_buffer("shift", (our_mean - mean) / std, persistent=False)
        self.check_maps()

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of a plain ViT; empty for other networks, each of which has its own structure."""
        return [*self.body.model.blocks] if self.is_vit else []

    @torch.no_grad()
    def check_maps(self, channels: int = 3) -> None:
        """UserError for a network of fixed size or channels, or with unexpected maps, by a pass of a small image."""
        height, width = 2 * self.multiple, 3 * self.multiple
        self.eval()
        try:
            shapes = [tuple(feature.shape[1:]) for feature in self(torch.zeros(1, channels, height, width))]
        except Exception as error:  # each network reports a fixed size in its own way
            kind = "any size" if channels == 3 else f"{channels} channels"
            raise unsuitable_error(self.name, f"it does not take images of {kind} ({reason_of(error)})") from error
        self.train()
        cells = [(int(height / stride), int(width / stride)) for stride in self.strides]
        if shapes != [(channels, *size) for channels, size in zip(self.channels, cells, strict=True)]:
            raise unsuitable_error(
                self.name, f"its maps of {height} x {width} pixels are {shapes}, which do not match its strides"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's gradient checkpointing, by stage or block."""
        if not enable:
            return
        if self.has_batch_norm:
            raise UserError(
                f"model.checkpointing=true with model.encoder={PREFIX}{self.name}: its batch norm would count each "
                "batch twice; set model.checkpointing=false, or choose an encoder without batch norm"
            )
        network = self.body if hasattr(self.body, "set_grad_checkpointing") else getattr(self.body, "model", self.body)
        if not hasattr(network, "set_grad_checkpointing"):
            raise UserError(
                f"model.checkpointing=true with model.encoder={PREFIX}{self.name}: timm does not support it; set "
                "model.checkpointing=false"
            )
        network.set_grad_checkpointing(True)

    def forward(self, image: Tensor, pyramid: bool = True) -> list[Tensor]:
        """Four maps; pyramid=False: those of the body alone."""
        image = pad_to_multiple(image, self.multiple) * self.scale + self.shift
        if self.has_batch_norm and image.device.type == "cpu":
            # Without it, torch computes the 1x1 convolutions of a single thread by a slow kernel
            image = image.contiguous(memory_format=torch.channels_last)
        features = self.body(image)[-LEVELS:]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return self.pyramid(features[-1]) if self.pyramid is not None and pyramid else features

    def download_hint(self) -> str:
        """How to download timm's weights, which is never done automatically; empty if timm has none."""
        repository = f"timm/{self.name}" if "." in self.name else self.body.pretrained_cfg.get("hf_hub_id")
        folder = f"pretrained_weights/{self.name}"
        command = f"hf download {repository} model.safetensors --local-dir {folder}"
        return f"get it by `{command}` and set model.pretrained={folder}/model.safetensors" if repository else ""

    def check_file(self, path: Path) -> None:
        """UserError, with a download hint, if the weight file does not exist."""
        if not path.exists():
            hint = "; ".join(filter(None, ["give its path, or 'none' to start without one", self.download_hint()]))
            raise UserError(f"{path}: no such weight file; {hint}")

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint of timm, or of one that timm can convert, under the names of this module."""
        import timm

        network = timm.create_model(self.name, num_classes=0, **self.options)
        convert = getattr(sys.modules[timm.model_entrypoint(self.name).__module__], "checkpoint_filter_fn", None)
        if convert is not None:  # timm: file -> its names, position embeddings of this network's size
            tensors = convert(dict(tensors), network)
        ours = {normalize_name(name): f"body.{name}" for name in self.body.state_dict()}
        return {ours.get(normalize_name(name), name): tensor for name, tensor in tensors.items()}


class SimplePyramid(nn.Module):
    """The last map (B, C, h, w) of a plain ViT, h and w even -> four maps of 256 channels (ViTDet, section 3).

    Deconvolutions to 4 and 2 times its size, the map itself, and max pooling to half its size; then a 1x1 and a 3x3
    convolution with LayerNorm each. `norm` replaces the last norm of the ViT, which timm's features lack.
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
        """Strides of the four maps, for example 3.5, 7, 14 and 28 for patches of 14 pixels."""
        return tuple(stride if stride % 1 else int(stride) for stride in (patch / 4, patch / 2, patch, 2 * patch))

    def forward(self, feature: Tensor) -> list[Tensor]:
        feature = self.norm(feature)
        return [level(feature) for level in self.levels]


def up(in_channels: int, channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, channels, 2, stride=2)


class DINOv2(TimmEncoder):
    """DINOv2 without registers (arXiv 2304.07193): timm's ViT with the position embedding of DINOv2's own code.

    Args:
        name: dinov2_small, _base, _large or _giant.
        drop_path, tokens: as for TimmEncoder.
    """

    def __init__(self, name: str, drop_path: float = 0.0, tokens: bool = False) -> None:
        super().__init__(DINOV2[name], drop_path, tokens)
        self.published = name
        self.body.model._pos_embed = MethodType(embed_positions, self.body.model)

    def download_hint(self) -> str:
        file = f"pretrained_weights/{self.published}.pth"
        return f"get it by `python -m allspark weights fetch {self.published}` and set model.pretrained={file}"


DINOV2 = {f"dinov2_{size}": f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")}


def embed_positions(vit: nn.Module, patches: Tensor) -> Tensor:
    """Patches (B, h, w, C) -> tokens (B, 1 + h * w, C) with class token and position embedding.

    In place of timm's method of the ViT. DINOv2 resizes the position embedding without antialiasing, and by a scale
    that is 0.1 cells too large; timm and newer versions of transformers use the exact scale.
    """
    height, width = patches.shape[1:3]
    grid = vit.patch_embed.grid_size
    cls, positions = vit.pos_embed.split((1, grid[0] * grid[1]), 1)
    if (height, width) != grid:
        # Not F.interpolate(scale_factor=...), whose factors torch.export would fix. At the grid's own size, which only
        # an exported network gets here, the offset is 0.
        sides = [torch.full((), side, dtype=torch.float32, device=patches.device) for side in (height, width)]
        offset = 0.1 * ((sides[0] != grid[0]) | (sides[1] != grid[1]))
        down, across = (
            bicubic_weights(
                (torch.arange(number, device=patches.device) + 0.5) * length / (side + offset) - 0.5, length
            )
            for number, side, length in zip((height, width), sides, grid, strict=True)
        )
        positions = positions.transpose(1, 2).unflatten(2, grid)  # (1, C, *grid)
        with torch.autocast(patches.device.type, enabled=False):
            positions = (down.to(positions) @ positions @ across.to(positions).T).flatten(2).transpose(1, 2)
    cls = (vit.cls_token + cls).expand(patches.shape[0], -1, -1)  # not len: torch.export would fix the batch
    return vit.pos_drop(torch.cat((cls, patches.flatten(1, 2) + positions), 1))


def bicubic_weights(positions: Tensor, length: int) -> Tensor:
    """Weights of bicubic interpolation (a = -0.75, as torch's), with the border repeated.

    By products with them, whose gradient, unlike that of F.grid_sample, is deterministic on a GPU.

    Args:
        positions: (n,), where to interpolate; 0 is the center of the first value.
        length: number of values.

    Returns:
        (n, length)
    """
    neighbors = positions.floor()[:, None] + torch.arange(-1, 3, device=positions.device)  # (n, 4)
    far = (positions[:, None] - neighbors).abs()
    near = 1.25 * far**3 - 2.25 * far**2 + 1
    weights = torch.where(far <= 1, near, -0.75 * (far**3 - 5 * far**2 + 8 * far - 4))
    values = torch.arange(length, device=positions.device)
    return (weights[..., None] * (neighbors.clamp(0, length - 1)[..., None] == values)).sum(1)


def create_body(name: str, drop_path: float, tokens: bool) -> tuple[nn.Module, dict[str, object]]:
    """timm's feature network with fresh weights, and those of our options that it accepts; see TimmEncoder."""
    import timm  # takes as long to import as torch

    if not timm.is_model(name):  # also refuses hf-hub:... and local-dir:..., so nothing is downloaded
        raise UserError(
            f"model.encoder={PREFIX}{name}: timm {timm.__version__} has no such model; {similar_names(name)}"
        )
    options = {"drop_path_rate": drop_path, "dynamic_img_size": True}  # position embeddings for any image size
    while True:
        try:
            if not tokens:
                return timm.create_model(name, features_only=True, **options), options
            network = timm.create_model(name, num_classes=0, **options)
            if hasattr(network, "patch_embed") and hasattr(network, "pos_embed") and hasattr(network, "blocks"):
                return TokenLayers(network), options
            tokens = False  # not a plain ViT
        except TypeError as error:
            accepted = {key: value for key, value in options.items() if key not in str(error)}  # it names the others
            if accepted == options:
                raise
            options = accepted
        except Exception as error:  # each network reports what it lacks in its own way
            raise unsuitable_error(name, f"timm gives no features of it ({reason_of(error)})") from error


class TokenLayers(nn.Module):
    """A plain ViT of timm as a feature network: image -> four of its layers (B, C, h, w), through the ViT's last norm.

    Args:
        network: the ViT.
    """

    def __init__(self, network: nn.Module) -> None:
        from timm.models import FeatureInfo

        super().__init__()
        depth = len(network.blocks)
        layers = [(level + 1) * depth // LEVELS - 1 for level in range(LEVELS)]
        if depth == 24:
            layers[0] = 4  # in UniMatch V2 and Depth Anything, not 5
        self.layers = network.prune_intermediate_layers(layers)
        self.feature_info = FeatureInfo(network.feature_info, self.layers)
        self.model, self.pretrained_cfg = network, network.pretrained_cfg

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(image, self.layers, norm=True, intermediates_only=True)


def similar_names(name: str) -> str:
    import timm

    architecture = name.partition(".")[0]
    close = difflib.get_close_matches(architecture, timm.list_models(), 4) or timm.list_models(f"*{architecture}*")[:4]
    return f"did you mean {' or '.join(PREFIX + other for other in close)}?" if close else SUGGESTION


def unsuitable_error(name: str, why: str) -> UserError:
    return UserError(f"model.encoder={PREFIX}{name}: cannot be an encoder here: {why}; {SUGGESTION}")


SUGGESTION = (
    "use a network with a feature pyramid, such as timm:convnext_tiny, timm:swin_tiny_patch4_window7_224 or "
    "timm:efficientnet_b0, or a plain ViT, such as timm:vit_small_patch14_dinov2 (timm.list_models() has the names)"
)


def normalize_name(name: str) -> str:
    """A parameter name without the changes of timm's feature networks: prefix `model.`, and `_` instead of some `.`."""
    return name.removeprefix("model.").replace(".", "_")
