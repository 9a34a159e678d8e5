"""The network, encoder -> bottleneck -> decoder, and build_model, which makes it from a recipe."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from allspark.config import ModelConfig, Size, height_width
from allspark.models import mit, resnet
from allspark.models.bottleneck import AllSparkBottleneck, CrossBatch
from allspark.models.decoders import DECODERS, build_decoder
from allspark.models.input_channels import set_input_channels
from allspark.models.memory import SemanticMemory
from allspark.models.resize import nearest_multiple, pad_to_multiple, resize, resize_to_image, resize_to_multiple
from allspark.models.timm_encoder import DINOV2, PREFIX, DINOv2, TimmEncoder
from allspark.utils.errors import UserError

# name -> function of the drop-path rate that makes an encoder: (B, C, H, W) -> four feature maps, finest first. It has
# the attributes `channels` and `strides` of its maps and `decoder_channels`, the default width of the decoder, and the
# method `set_grad_checkpointing`; with a list `blocks`, it can be frozen in part and have a layer-wise learning rate.
ENCODERS: dict[str, Callable[[float], nn.Module]] = {
    **{name: partial(mit.MiT, size) for name, size in mit.SIZES.items()},
    **{name: partial(resnet.ResNet, name) for name in resnet.SIZES},
}
Perturb = Callable[[list[Tensor]], list[Tensor]]  # four feature maps, finest first -> four maps of the same shapes


@dataclass(frozen=True)
class SegOutput:
    """What the network returns.

    Args:
        logits: (B, K, H, W), at the size of the input.
        perturbed: (B, K, H, W), logits of the perturbed features, if they were asked for besides the clean ones.
        features: four feature maps (B, C_i, h_i, w_i), finest first, the last one after the bottleneck.
    """

    logits: Tensor
    perturbed: Tensor | None = None
    features: list[Tensor] | None = None


class Segmentor(nn.Module):
    """Semantic segmentation network: normalized images (B, C, H, W), H and W >= 32, -> SegOutput.

    Args:
        encoder: images -> four feature maps, see ENCODERS.
        bottleneck: applied to the deepest map; None: no bottleneck.
        decoder: four feature maps -> logits, see DECODERS.
        fit: "pad" or "resize": how sides become multiples of what TimmEncoder needs.
        on_tokens: the bottleneck is applied to the last map of a plain ViT, from which the pyramid is made.

    Attributes:
        heads: modules that a method trains besides the decoder, added by Method.attach; they use SegOutput.features.
        multiple: image sides are padded to a multiple of this; 1 disables padding.
        nearest: image sides are resized to the nearest multiple of this; 1 disables resizing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: AllSparkBottleneck | None,
        decoder: nn.Module,
        fit: str = "pad",
        on_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.heads = nn.ModuleDict()
        multiple = getattr(encoder, "multiple", 1)
        self.multiple, self.nearest = (multiple, 1) if fit == "pad" else (1, multiple)
        self.on_tokens = on_tokens

    def forward(
        self,
        image: Tensor,
        *,
        cross: CrossBatch | None = None,
        share_keys: bool = False,
        perturb: Perturb | None = None,
        clean: bool = True,
    ) -> SegOutput:
        """Predict the classes of all pixels.

        Args:
            image: (B, C, H, W).
            cross: describes a training batch of labeled and unlabeled images; None: inference, no image depends on
                another.
            share_keys: in inference, the images of the batch share the keys of the bottleneck (Released, for
                pseudo-labels).
            perturb: features -> features, from the same encoder pass. Clean and perturbed features are decoded as one
                batch, so that batch norm sees both (UniMatch).
            clean: False: decode only the perturbed features and return their logits as `logits`.
        """
        size, image = image.shape[-2:], resize_to_multiple(image, self.nearest)
        if cross is not None and cross.pseudo_logits is not None:  # cover the same area as the feature map
            cross = replace(cross, pseudo_logits=pad_to_multiple(cross.pseudo_logits, self.multiple, "replicate"))
        if self.bottleneck is None:
            features = self.encoder(image)
        elif self.on_tokens:
            *_, tokens = self.encoder(image, pyramid=False)
            features = self.encoder.pyramid(self.bottleneck(tokens, cross, share_keys))
        else:
            *others, deepest = self.encoder(image)
            features = [*others, self.bottleneck(deepest, cross, share_keys)]
        if perturb is None:
            return SegOutput(self.decode(features, size), features=features)
        if not clean:
            return SegOutput(self.decode(perturb(features), size), features=features)
        both = [torch.cat(pair) for pair in zip(features, perturb(features), strict=True)]
        return SegOutput(*self.decode(both, size).chunk(2), features)

    def decode(self, features: list[Tensor], size: torch.Size) -> Tensor:
        """Feature maps -> logits (B, K, *size), float32 (or float64) also under autocast."""
        logits = self.decoder(features)
        # Make them contiguous while they are small; losses would copy them later
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        align_corners = self.decoder.align_corners
        fitted = [nearest_multiple(side, self.nearest) for side in size]
        return resize(resize_to_image(logits, fitted, self.multiple, align_corners), size, align_corners)

    def train(self, mode: bool = True) -> Segmentor:
        """Modules of the encoder whose parameters are all frozen stay in evaluation mode."""
        super().train(mode)
        for module in self.encoder.modules() if mode else ():
            trainable = [parameter.requires_grad for parameter in module.parameters()]
            if trainable and not any(trainable):
                module.eval()
        return self

    def compile_parts(self, backend: str = "inductor") -> None:
        """torch.compile of encoder and decoder; the bottleneck's block-wise CPU kernel cannot be traced as a graph."""
        if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise UserError("compile=true needs a C++ compiler; install g++, load its module, or set compile=false")
        for part in (self.encoder, self.decoder):
            part.compile(dynamic=False, backend=backend)

    def inference_copy(self) -> Segmentor:
        """A frozen copy for inference, without the memory, which only training reads."""
        copied = copy.deepcopy(self)
        if copied.bottleneck is not None:
            copied.bottleneck.memory = None
        return copied.eval().requires_grad_(False)


def build_model(cfg: ModelConfig, num_classes: int, crop_size: Size, channels: int = 3) -> Segmentor:
    """Build a model with fresh weights.

    Args:
        cfg: the model section of a recipe.
        num_classes: K.
        crop_size: of the training crops, which sets the size of the memory, ceil(crop_size / stride).
        channels: of the images.
    """
    encoder = build_encoder(cfg)
    set_input_channels(encoder, channels)
    encoder.set_grad_checkpointing(cfg.checkpointing)
    decoder = build_decoder(cfg, encoder, num_classes)
    bottleneck, on_tokens = None, False
    if cfg.bottleneck.name == "allspark":
        width, stride = encoder.channels[-1], encoder.strides[-1]
        if cfg.bottleneck.place == "tokens":
            if not getattr(encoder, "is_vit", False):
                raise UserError(
                    f"model.bottleneck.place=tokens with model.encoder={cfg.encoder}: only a plain ViT, such as "
                    f"dinov2_small, has tokens before its pyramid; set model.bottleneck.place=pyramid"
                )
            width, stride = encoder.token_channels, encoder.token_stride
            on_tokens = encoder.pyramid is not None  # with decoder=dpt they are the deepest map
        multiple = getattr(encoder, "multiple", 1)
        fitted = [
            nearest_multiple(side, multiple) if cfg.fit == "resize" else side + -side % multiple
            for side in height_width(crop_size)
        ]
        if getattr(encoder, "pool_rounds_up", False) and any(side % stride != 1 for side in fitted):
            raise UserError(
                f"data.crop_size={crop_size} with model.encoder={cfg.encoder} and a bottleneck: the memory needs sides "
                f"that are a multiple of {stride} plus 1; set data.crop_size={fitted[0] // stride * stride + 1}"
            )
        rows, columns = (math.ceil(side / stride) for side in fitted)
        memory = SemanticMemory(num_classes, width, (rows, columns), cfg.bottleneck.memory_policy)
        bottleneck = AllSparkBottleneck(
            width,
            memory,
            num_heads=cfg.bottleneck.num_heads,
            dropout=cfg.bottleneck.dropout,
            grouping_input=cfg.bottleneck.grouping_input,
            context=cfg.bottleneck.context,
            empty_slots=cfg.bottleneck.empty_slots,
            own_channels=cfg.bottleneck.own_channels,
            skip=cfg.bottleneck.skip,
            attention=cfg.bottleneck.attention,
        )
    return Segmentor(encoder, bottleneck, decoder, cfg.fit, on_tokens)


def build_encoder(cfg: ModelConfig) -> nn.Module:
    takes_tokens = DECODERS[cfg.decoder].takes_tokens
    if cfg.encoder.startswith(PREFIX):
        return TimmEncoder(cfg.encoder.removeprefix(PREFIX), cfg.drop_path, takes_tokens)
    if cfg.encoder in DINOV2:
        return DINOv2(cfg.encoder, cfg.drop_path, takes_tokens)
    if cfg.encoder not in ENCODERS:
        known = ", ".join((*ENCODERS, *DINOV2, f"{PREFIX}NAME"))
        raise UserError(f"model.encoder={cfg.encoder}: unknown encoder; choose one of {known} (a model of timm)")
    return ENCODERS[cfg.encoder](cfg.drop_path)


def unwrap(model: nn.Module) -> Segmentor:
    """The Segmentor inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
