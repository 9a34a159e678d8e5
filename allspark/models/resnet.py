"""ResNet-50 and ResNet-101 of timm as encoders, dilated to output stride 16: what DeepLabV3+ is published on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ResNetSize:
    """What differs between them; blocks and widths are those of arXiv 1512.03385, table 1.

    stem: channels behind it, 64: one 7x7 convolution; 128: three of 3x3, as in the released UniMatch and iMAS.
    """

    depths: tuple[int, int, int, int]
    stem: int
    channels: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    strides: tuple[int, int, int, int] = (4, 8, 16, 16)
    decoder_channels: int = 256


SIZES = {  # by timm's names
    "resnet50": ResNetSize((3, 4, 6, 3), 64),
    "resnet101": ResNetSize((3, 4, 23, 3), 64),
    "resnet50s": ResNetSize((3, 4, 6, 3), 128),
    "resnet101s": ResNetSize((3, 4, 23, 3), 128),
}


class ResNet(nn.Module):
    """image (B, 3, H, W) -> four maps (B, C_i, H_i, W_i) of strides 4, 8, 16, 16, rounded up.

    The last stage has no stride but dilation 2, from its second block on. The state_dict has the names that timm and
    torchvision share (conv1, bn1, layer1 ... layer4), without a classifier. drop_path: published is 0.
    """

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        import timm  # takes as long to import as torch
        from timm.models import FeatureListNet

        super().__init__()
        size = SIZES[name]
        network = timm.create_model(name, output_stride=size.strides[-1], drop_path_rate=drop_path)
        features = FeatureListNet(network, out_indices=(1, 2, 3, 4))
        self.feature_info = features.feature_info
        for child, module in features.items():
            self.add_module(child, module)
        self.run_block: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.channels, self.strides = size.channels, size.strides
        self.decoder_channels = size.decoder_channels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        # disabled for torch.compile: dynamo does not know context_fn
        self.run_block = torch.compiler.disable(checkpointed) if enable else None

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


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which the backward pass finds only x kept and makes the rest again."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), uncounted(block)))


@contextmanager
def uncounted(block: nn.Module) -> Iterator[None]:
    """Batch norm leaves its running statistics as they are: the batch went into them when it came by first."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
