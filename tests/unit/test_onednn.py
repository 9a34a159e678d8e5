"""Products by oneDNN equal torch's, in every layout, with gradients; torch's kernel computes what they do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from allspark.engine import onednn
from allspark.engine.stepper import set_precision
from allspark.utils.processor import is_amd

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")

TWO_SIDES = (100, 300, 70), (24, 4225, 144), (24, 4229, 144), (390, 2000, 88), (3, 5, 7)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def layouts(rows, columns):
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows, 2 * columns)[:, ::2]


@pytest.mark.parametrize(("m", "k", "n"), TWO_SIDES)
def test_products_of_every_layout(m, k, n):
    for a in layouts(m, k):
        for b in layouts(k, n):
            exact = (a.double() @ b.double()).float()
            bias, total = torch.randn(n), torch.randn(m, n)
            close(onednn.mm(a, b), exact)
            close(onednn.mm_out(a, b, out=torch.empty(0)), exact)
            wide = torch.zeros(m, 2 * n)
            onednn.mm_out(a, b, out=wide[:, ::2])
            close(wide[:, ::2], exact)
            assert not wide[:, 1::2].any()
            close(onednn.addmm(bias, a, b), exact + bias)
            close(onednn.addmm(total, a, b, beta=0.5, alpha=2), 2 * exact + total / 2)
            close(onednn.addmm_(total.clone(), a, b), exact + total)


def test_a_large_product_goes_to_onednn_and_others_do_not():
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    assert onednn.product(a, b) is not None
    assert onednn.product(a[:10, :10], b[:10, :10]) is None
    assert onednn.product(a.double(), b.double()) is None
    assert torch.equal(onednn.mm(a.double(), b.double()), a.double() @ b.double())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (1, 1), (3, 1)])
def test_convolutions_and_their_gradients(kernel, padding, channels_last):
    image, weight, bias = torch.randn(2, 24, 17, 33), torch.randn(40, 24, kernel, kernel), torch.randn(40)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    options = ([kernel, kernel], bias, [1, 1], [padding, padding])
    exact = F.conv2d(image.double(), weight.double(), bias.double(), padding=padding)
    close(onednn.conv_forward(image, weight, *options), exact.float())
    grad = torch.randn(exact.shape)
    expected = torch.ops.aten.convolution_backward(
        *(x.double() for x in (grad, image, weight)), [40], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True] * 3
    )
    found = onednn.conv_backward(grad, image, weight, options[0], *options[2:], [True] * 3)
    for one, other in zip(found, expected, strict=True):
        close(one, other.float())
    only = onednn.conv_backward(grad, image, weight, options[0], *options[2:], [False, True, False])
    assert only[0] is None and only[2] is None
    close(only[1], expected[1].float())


def test_a_run_in_float32_uses_them_where_they_are_faster():
    def used():
        with torch.profiler.profile() as profile:
            torch.nn.Linear(200, 200)(torch.randn(200, 200)).sum().backward()
        return any(event.key == "mkldnn::_linear_pointwise" for event in profile.key_averages())

    faster = is_amd() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    set_precision("fp32", torch.device("cpu"))
    assert used() == faster
    with onednn.torch_kernels():
        assert not used()
    assert used() == faster
    set_precision("bf16", torch.device("cpu"))
    assert not used()
