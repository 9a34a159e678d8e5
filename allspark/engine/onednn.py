"""Float32 matrix products by oneDNN in place of MKL, twice as fast on AMD processors with AVX-512.

torch computes them, and single-threaded 1x1 convolutions of small batches, with MKL, which uses AVX2 on an AMD
processor. oneDNN, another part of torch, uses AVX-512 on any processor. The kernels below take the place of torch's own
in the whole process; gradients stay torch's, and results differ by float32 rounding.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from allspark.utils.processor import is_amd

MIN_WORK = 1 << 17  # multiplications; with fewer, the call costs more than it saves
LONG_SUM = 2  # times the shorter side of the result; longer sums are faster as the weight gradient of a convolution
ROWS = range(16, 257)  # batch sizes for which torch uses oneDNN even with one thread

aten = torch.ops.aten
library: torch.library.Library | None = None  # its kernels are registered while it exists


def use_onednn(wanted: bool) -> None:
    """Replace torch's kernels for tensors on a CPU if this is an AMD processor with AVX-512, or restore them."""
    global library
    if library is not None and not wanted:
        library._destroy()
        library = None
    elif library is None and wanted and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and is_amd():
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are replaced
            library.impl("mm", mm, "CPU")
            library.impl("mm.out", mm_out, "CPU")
            library.impl("addmm", addmm, "CPU")
            library.impl("addmm_", addmm_, "CPU")
            library.impl("_slow_conv2d_forward", conv_forward, "CPU")
            library.impl("_slow_conv2d_backward.output_mask", conv_backward, "CPU")


@contextlib.contextmanager
def torch_kernels() -> Iterator[None]:
    """In this context nothing is replaced, for comparisons."""
    replaced = library is not None
    use_onednn(False)
    try:
        yield
    finally:
        use_onednn(replaced)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """a (M, K) @ b (K, N) + bias (N,) by oneDNN; None where torch's kernel is to compute it."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != torch.float32 or b.dtype != torch.float32 or m * k * n < MIN_WORK:
        return None
    if bias is None and k > LONG_SUM * min(m, n) and a.t().is_contiguous() and b.is_contiguous():
        rows = next((rows for rows in ROWS if k % rows == 0), None)
        if rows is not None:
            return weight_gradient(a.t().view(rows, -1, m), b.view(rows, -1, n))
    if not b.t().is_contiguous():
        b = b.contiguous()  # a part of a tensor would take oneDNN a thousand times longer
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def weight_gradient(grad: Tensor, image: Tensor) -> Tensor:
    """That of a linear layer, as a 1x1 convolution: grad (B, W, M), image (B, W, N) -> (M, N)."""
    grad, image = (x.permute(0, 2, 1).unsqueeze(2) for x in (grad, image))
    weight = grad.new_empty(grad.shape[1], image.shape[1], 1, 1)
    return convolution_gradients(grad, image, weight, (False, True, False))[1].flatten(1)


def mm(a: Tensor, b: Tensor) -> Tensor:
    found = product(a, b)
    return mm_out(a, b, out=a.new_empty(len(a), b.shape[1])) if found is None else found


def mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    found = product(a, b)
    out.resize_(len(a), b.shape[1])
    return torch.addmm(out, a, b, beta=0, out=out) if found is None else out.copy_(found)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    plain = bias.dim() == 1 and len(bias) == b.shape[1] and beta == alpha == 1
    found = product(a, b, bias) if plain else None
    if found is None:
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(len(a), b.shape[1]))
    return found


def addmm_(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    found = product(a, b) if beta == alpha == 1 else None
    return torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total) if found is None else total.add_(found)


def as_rows(image: Tensor) -> Tensor:
    """(B, C, H, W), channels last -> (B * H, C, 1, W), the same memory."""
    return image.permute(0, 2, 3, 1).flatten(0, 1).unsqueeze(1).permute(0, 3, 1, 2)


def from_rows(rows: Tensor, batch: int) -> Tensor:
    """(B * H, C, 1, W) -> (B, C, H, W), channels last."""
    return rows.permute(0, 2, 3, 1).squeeze(1).unflatten(0, (batch, -1)).permute(0, 3, 1, 2)


def is_product(image: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a convolution that torch gives to MKL is a product of pixels, and large enough for oneDNN."""
    return (
        (*stride, *padding) == (1, 1, 0, 0)
        and image.dtype == torch.float32
        and weight.shape[2:] == (1, 1)
        and len(image) * image.shape[2] >= ROWS.start
        and image.is_contiguous(memory_format=torch.channels_last)
        and image.numel() * len(weight) >= MIN_WORK
    )


def conv_forward(
    image: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    if not is_product(image, weight, stride, padding):
        out = image.new_empty(0)
        return aten._slow_conv2d_forward.output(image, weight, kernel, bias, stride, padding, output=out)
    out = aten.mkldnn_convolution(as_rows(image), weight, bias, padding, stride, (1, 1), 1)
    return from_rows(out, len(image))


def conv_backward(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    if not is_product(image, weight, stride, padding):
        like = {"grad_input": image, "grad_weight": weight, "grad_bias": weight[:, 0, 0, 0]}
        empty = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in like.items()}
        found = aten._slow_conv2d_backward.grad_input(
            grad.contiguous(), image.contiguous(), weight.contiguous(), kernel, stride, padding, **empty
        )
        return tuple(x if wanted else None for x, wanted in zip(found, mask, strict=True))
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_image, *others = convolution_gradients(as_rows(grad), as_rows(image), weight, mask)
    return grad_image if grad_image is None else from_rows(grad_image, len(image)), *others


def convolution_gradients(grad: Tensor, image: Tensor, weight: Tensor, mask: Sequence[bool]) -> Sequence[Tensor]:
    """Gradients of image, weight and bias of a 1x1 convolution; None where the mask is False."""
    return aten.convolution_backward(
        grad, image, weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
    )
