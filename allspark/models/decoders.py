"""The decoders by name."""

from __future__ import annotations

from torch import nn

from allspark.config import ModelConfig
from allspark.models.deeplab import DeepLabV3Plus
from allspark.models.dpt import DPT
from allspark.models.mlp_decoder import MLPBNDecoder, MLPDecoder
from allspark.utils.errors import UserError

# A decoder has the arguments of MLPDecoder. `unsupported(strides)` says why it cannot decode maps of these strides,
# `example` is an encoder it can, `takes_tokens` whether a plain ViT gives it four of its layers in place of a pyramid.
# `align_corners` says how its logits are resized to the image, `classifier` is its last layer.
DECODERS = {"mlp": MLPDecoder, "mlp_bn": MLPBNDecoder, "deeplab": DeepLabV3Plus, "dpt": DPT}


def build_decoder(cfg: ModelConfig, encoder: nn.Module, num_classes: int) -> nn.Module:
    """The decoder of a recipe for the maps of this encoder; UserError if it cannot decode them."""
    kind = DECODERS[cfg.decoder]
    if reason := kind.unsupported(encoder.strides):
        suitable = [name for name, other in DECODERS.items() if not other.unsupported(encoder.strides)]
        raise UserError(
            f"model.decoder={cfg.decoder} with model.encoder={cfg.encoder}: the decoder {reason}; this encoder's maps "
            f"have strides {'/'.join(map(str, encoder.strides))}. Set model.decoder={' or '.join(suitable)}, or a "
            f"suitable encoder, such as model.encoder={kind.example}"
        )
    width = cfg.decoder_channels or encoder.decoder_channels
    return kind(encoder.channels, num_classes, width, cfg.dropout, encoder.strides)
