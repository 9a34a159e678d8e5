"""Batch norm over two processes against batch norm over all their images in one."""

import torch
from torch import nn

from allspark import distributed
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
