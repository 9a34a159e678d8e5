"""DeepLabV3+ models with few classes."""

import torch

from allspark.config import BottleneckConfig, ModelConfig
from allspark.models.resnet import SIZES
from allspark.models.segmentor import build_model

CLASSES, CROP = 4, 64
TIMM_NAMES = [name for name, size in SIZES.items() if not size.multi_grid]


def make_model(encoder="resnet50", crop=CROP, bottleneck="none", **options):
    torch.manual_seed(0)
    part = BottleneckConfig(name=bottleneck, num_heads=1)
    options = {"decoder": "deeplab", "drop_path": 0.0, "dropout": 0.0, **options}
    return build_model(ModelConfig(encoder=encoder, bottleneck=part, **options), CLASSES, crop).train()


def filled(network):
    """Random statistics and weights of batch norm, so that a tensor in a wrong place is noticed."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                torch.nn.init.normal_(tensor, std=0.1)
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.8, 1.2)
    return network.eval()
