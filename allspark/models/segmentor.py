"""The whole network: encoder -> bottleneck -> decoder, and build_model, the one place where its sizes meet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from allspark.config import ModelConfig
from allspark.models import mit, resnet
from allspark.models.bottleneck import AllSparkBottleneck, CrossBatch
from allspark.models.memory import SemanticMemory
from allspark.models.mlp_decoder import build_decoder, cover, uncover
from allspark.models.timm_encoder import PREFIX, TimmEncoder
from allspark.utils.errors import UserError

# drop-path rate -> a module that takes (B, 3, H, W) to four maps, finest first. Its attributes `channels` and `strides`
# hold their widths and strides, `decoder_channels` the width of the decoder unless the recipe says otherwise, and its
# method `set_grad_checkpointing` makes it keep less for the backward pass.
ENCODERS: dict[str, Callable[[float], nn.Module]] = {
    "mit_b0": partial(mit.MiT, mit.B0),
    "mit_b1": partial(mit.MiT, mit.B1),
    "mit_b2": partial(mit.MiT, mit.B2),
    "mit_b3": partial(mit.MiT, mit.B3),
    "mit_b4": partial(mit.MiT, mit.B4),
    "mit_b5": partial(mit.MiT, mit.B5),
    **{name: partial(resnet.ResNet, name) for name in resnet.SIZES},
}


Perturb = Callable[[list[Tensor]], list[Tensor]]  # four feature maps, finest first -> four maps of the same shapes


@dataclass(frozen=True)
class SegOutput:
    """logits (B, K, H, W) at the size of the input; perturbed: logits of the perturbed features, where asked for."""

    logits: Tensor
    perturbed: Tensor | None = None
    features: list[Tensor] | None = None


class Segmentor(nn.Module):
    """image (B, 3, H, W), normalized, H and W >= 32 -> SegOutput. Sizes and devices follow the input.

    heads: what a method trains beside the decoder (Method.attach puts it there); it works on SegOutput.features.
    """

    def __init__(self, encoder: nn.Module, bottleneck: AllSparkBottleneck | None, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.heads = nn.ModuleDict()
        self.multiple = getattr(encoder, "multiple", 1)  # of pixels, to which a TimmEncoder pads an image

    def forward(
        self,
        image: Tensor,
        *,
        cross: CrossBatch | None = None,
        share_keys: bool = False,
        perturb: Perturb | None = None,
        clean: bool = True,
    ) -> SegOutput:
        """cross: a training batch of labeled and unlabeled images; None: inference, no image depends on another.

        share_keys: batch mates share the keys of the bottleneck (Released, pseudo-labels only).
        perturb: features -> features; its logits are returned beside the clean ones, from the same encoder pass and
        decoded as one batch with them (UniMatch: batch norm sees both), or with clean=False as the only ones.
        """
        features = self.encoder(image)
        if self.bottleneck is not None:
            if cross is not None and cross.pseudo_logits is not None:  # they are held against the cells' channels
                cross = replace(cross, pseudo_logits=cover(cross.pseudo_logits, self.multiple, "replicate"))
            features = [*features[:-1], self.bottleneck(features[-1], cross, share_keys)]
        size = image.shape[-2:]
        if perturb is None:
            return SegOutput(self.decode(features, size), features=features)
        if not clean:
            return SegOutput(self.decode(perturb(features), size), features=features)
        both = [torch.cat(pair) for pair in zip(features, perturb(features), strict=True)]
        return SegOutput(*self.decode(both, size).chunk(2), features)

    def decode(self, features: list[Tensor], size: torch.Size) -> Tensor:
        """Feature maps -> logits (B, K, *size), float32 whatever the precision of the rest."""
        logits = self.decoder(features)
        # Contiguous while they are small: losses copy them otherwise
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
        return uncover(logits, size, self.multiple, self.decoder.resize)

    def compile_parts(self, backend: str = "inductor") -> None:
        """Encoder and decoder, each shape of a training step once; the bottleneck's blocks on a CPU are no graph."""
        for part in (self.encoder, self.decoder):
            part.compile(dynamic=False, backend=backend)

    def inference_copy(self) -> Segmentor:
        """A network of its own with the same weights, for inference, which never reads the memory: it has none."""
        twin = copy.deepcopy(self)
        if twin.bottleneck is not None:
            twin.bottleneck.memory = None
        return twin.eval().requires_grad_(False)


def build_model(cfg: ModelConfig, num_classes: int, crop_size: int) -> Segmentor:
    """The model of a recipe with fresh weights; crop_size decides the side of the memory: ceil(crop / stride)."""
    encoder = build_encoder(cfg)
    encoder.set_grad_checkpointing(cfg.checkpointing)
    decoder = build_decoder(cfg, encoder, num_classes)
    bottleneck = None
    if cfg.bottleneck.name == "allspark":
        channels = encoder.channels[-1]
        side = math.ceil(crop_size / encoder.strides[-1])
        memory = SemanticMemory(num_classes, channels, side, cfg.bottleneck.memory_policy)
        bottleneck = AllSparkBottleneck(
            channels,
            memory,
            num_heads=cfg.bottleneck.num_heads,
            dropout=cfg.bottleneck.dropout,
            grouping_input=cfg.bottleneck.grouping_input,
            empty_slots=cfg.bottleneck.empty_slots,
            own_channels=cfg.bottleneck.own_channels,
            skip=cfg.bottleneck.skip,
            attention=cfg.bottleneck.attention,
        )
    return Segmentor(encoder, bottleneck, decoder)


def build_encoder(cfg: ModelConfig) -> nn.Module:
    if cfg.encoder.startswith(PREFIX):
        return TimmEncoder(cfg.encoder.removeprefix(PREFIX), cfg.drop_path)
    if cfg.encoder not in ENCODERS:
        known = ", ".join((*ENCODERS, f"{PREFIX}NAME"))
        raise UserError(f"model.encoder={cfg.encoder}: unknown encoder; one of {known}, a model of timm")
    return ENCODERS[cfg.encoder](cfg.drop_path)


def unwrap(model: nn.Module) -> Segmentor:
    """The Segmentor inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
