"""timm's ResNet-50 and ResNet-101 as encoders, dilated to output stride 16 or 8, as DeepLabV3+ is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ResNetSize:
    """Blocks and widths of arXiv 1512.03385, table 1.

    Args:
        depths: blocks per stage.
        stem: output channels of the stem; 64: one 7x7 convolution; 128: three 3x3 convolutions, as in the released
            UniMatch and iMAS.
        multi_grid: as in the released iMAS, the three blocks of the last stage have 2, 2 and 4 times its dilation
            (arXiv 1706.05587, section 3.2), and max pooling rounds up.
    """

    depths: tuple[int, int, int, int]
    stem: int
    channels: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    strides: tuple[int, int, int, int] = (4, 8, 16, 16)
    decoder_channels: int = 256
    multi_grid: bool = False


STRIDE_8 = (4, 8, 8, 8)
SIZES = {  # timm's names; *_imas: timm's resnet50s and resnet101s with iMAS's dilations
    "resnet50": ResNetSize((3, 4, 6, 3), 64),
    "resnet101": ResNetSize((3, 4, 23, 3), 64),
    "resnet50s": ResNetSize((3, 4, 6, 3), 128),
    "resnet101s": ResNetSize((3, 4, 23, 3), 128),
    "resnet50s_imas": ResNetSize((3, 4, 6, 3), 128, multi_grid=True),
    "resnet101s_imas": ResNetSize((3, 4, 23, 3), 128, multi_grid=True),
    "resnet50s_imas_os8": ResNetSize((3, 4, 6, 3), 128, strides=STRIDE_8, multi_grid=True),
    "resnet101s_imas_os8": ResNetSize((3, 4, 23, 3), 128, strides=STRIDE_8, multi_grid=True),
}


class ResNet(nn.Module):
    """image (B, 3, H, W) -> four maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 16 (or 4, 8, 8, 8), rounded up.

    A stage without a stride has twice the dilation instead, from its second block on. The state_dict has the names that
    timm and torchvision share (conv1, bn1, layer1 ... layer4), without a classifier.

    Args:
        name: a key of SIZES.
        drop_path: rate; 0 in the publications.
    """

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        import timm  # takes as long to import as torch
        from timm.models import FeatureListNet

        super().__init__()
        size = SIZES[name]
        network = timm.create_model(name.partition("_")[0], output_stride=size.strides[-1], drop_path_rate=drop_path)
        if size.multi_grid:
            network.maxpool.ceil_mode = True
            for block, factor in zip(network.layer4, (2, 2, 4), strict=True):
                rate = factor * block.conv2.dilation[0]
                block.conv2.dilation = block.conv2.padding = (rate, rate)
        features = FeatureListNet(network, out_indices=(1, 2, 3, 4))
        self.feature_info = features.feature_info
        for child, module in features.items():
            self.add_module(child, module)
        self.run_block: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.channels, self.strides = size.channels, size.strides
        self.pool_rounds_up = size.multi_grid  # even sides give maps of one row and column more
        self.decoder_channels = size.decoder_channels

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for name, stage in self.named_children() if name.startswith("layer") for block in stage]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        # Not compiled: dynamo does not support context_fn
        self.run_block = torch.compiler.disable(checkpoint_block) if enable else None

    def forward(self, image: Tensor) -> list[Tensor]:
        x, features = image, []
        for name, module in self.named_children():
            if not name.startswith("layer"):
                x = module(x)
                continue
            for block in module:
                x = block(x) if self.run_block is None else self.run_block(block, x)
            features.append(x)
        return features


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), whose activations are recomputed in the backward pass."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), freeze_statistics(block)))


@contextmanager
def freeze_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norm does not update its running statistics: the first forward pass has already counted this batch."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
