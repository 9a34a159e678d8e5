"""Batch norm over two processes against batch norm over all their images in one."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from allspark import distributed
from allspark.config import ModelConfig
from allspark.models.deeplab import ASPP
from allspark.models.segmentor import build_model
from allspark.models.sync_batch_norm import SyncBatchNorm


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), nn.Conv2d(5, 2, 1))
    nn.init.normal_(layers[1][0].weight)
    return layers.double()


def images():
    """Three images, of which process 0 has one and process 1 has two."""
    return 3 * torch.randn(3, 3, 6, 7, generator=torch.Generator().manual_seed(1)).double() + 1


def normalized():
    """Outputs, gradients and buffers of this process's images; sums over the processes make them those of all."""
    model = SyncBatchNorm.convert(network())
    x = images()[slice(0, 1) if distributed.rank() == 0 else slice(1, 3)].requires_grad_()
    out = model(x)
    (out**2).sum().backward()
    gradients = [distributed.all_reduce_sum(p.grad.clone()).tolist() for p in model.parameters()]
    evaluated = model.eval()(images())
    return (
        out.tolist(),
        x.grad.tolist(),
        gradients,
        {k: v.tolist() for k, v in model.named_buffers()},
        evaluated.tolist(),
    )


def test_equals_batch_norm_over_all_images(pair):
    model, x = network(), images().requires_grad_()
    out = model(x)
    (out**2).sum().backward()
    first, second = pair(normalized)
    close(first[0] + second[0], out)
    close(first[1] + second[1], x.grad)
    for mine, expected in zip(first[2], model.parameters(), strict=True):
        close(mine, expected.grad)
    for state in (first[3], second[3]):
        for name, buffer in model.named_buffers():
            close(state[name], buffer)
    close(first[4], model.eval()(images()))


def close(found, expected):
    found = torch.tensor(found, dtype=expected.dtype)
    torch.testing.assert_close(found, expected.detach())


def test_conversion_keeps_parameters():
    model = network()
    before = dict(model.named_parameters())
    converted = SyncBatchNorm.convert(model)
    assert all(before[name] is value for name, value in converted.named_parameters())
    assert type(converted[1][0]) is SyncBatchNorm and type(converted[0]) is nn.Conv2d
    x = images()
    torch.testing.assert_close(converted(x), network()(x))  # a process alone


@pytest.mark.parametrize(("encoder", "decoder"), [("resnet50", "deeplab"), ("timm:mobilenetv3_small_050", "mlp")])
def test_every_batch_norm_is_converted(encoder, decoder):
    """Of the image pooling and of timm's layers that have an activation inside, too."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(encoder=encoder, decoder=decoder), 3, 65)
    keys, x = list(model.state_dict()), torch.randn(2, 3, 65, 65)
    before = model.eval()(x).logits
    converted = SyncBatchNorm.convert(model)
    norms = [module for module in converted.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(type(norm) is SyncBatchNorm for norm in norms)
    assert list(converted.state_dict()) == keys
    torch.testing.assert_close(converted(x).logits, before)


def pooled():
    """The output of an ASPP for this process's image, with the statistics of both."""
    torch.manual_seed(0)
    aspp = SyncBatchNorm.convert(ASPP(4, 6, (2, 3)).double())
    return aspp(images_of_maps()[distributed.rank()][None]).tolist()


def images_of_maps():
    return 3 * torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2)).double() + 1


def test_image_pooling_sees_all_images(pair):
    torch.manual_seed(0)
    expected = ASPP(4, 6, (2, 3)).double()(images_of_maps())
    first, second = pair(pooled)
    close(first + second, expected)
