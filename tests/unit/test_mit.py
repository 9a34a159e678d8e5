"""Stochastic depth and precision of MiT; test_encoder_parity compares its maps with other implementations."""

import pytest
import torch

from allspark.memory_estimate import GPUKernels
from allspark.models.cast_weights import cast_weights
from allspark.models.mit import SIZES, Block, LayerNorm, MiT
from helpers.networks import make_model

CPU_BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def test_stochastic_depth_drops_whole_images():
    """In training a branch is 0 for some images, and 1 / (1 - rate) times itself for the others, as are its gradients;
    in evaluation, and with a rate of 0, nothing is drawn.
    """
    torch.manual_seed(0)
    block = Block(8, heads=1, reduction=1, drop_path=0.25)
    x, branch = torch.randn(4000, 2, 3, 8), torch.randn(4000, 2, 3, 8, requires_grad=True)
    out = block.add(x, branch)
    out.sum().backward()
    kept = branch.grad[:, 0, 0, 0] > 0
    assert 0.72 < kept.float().mean() < 0.78
    torch.testing.assert_close(out, x + branch * kept.view(-1, 1, 1, 1) / 0.75)
    torch.testing.assert_close(branch.grad, (kept / 0.75).view(-1, 1, 1, 1).expand_as(branch))
    state = torch.get_rng_state()
    assert torch.equal(block.eval().add(x, branch), x + branch)
    block.train().drop_path = 0.0
    assert torch.equal(block.add(x, branch), x + branch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("at_once", [False, True], ids=["weights of float32", "cast weights"])
def test_norm_keeps_half_precision_on_a_gpu(at_once):
    """Where autocast makes norms float32, MiT's stay in bf16, with the values of a CPU's up to rounding."""
    torch.manual_seed(0)
    norm, x = LayerNorm(32), torch.randn(50, 32, dtype=torch.bfloat16) * 3 + 1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.autocast(**CPU_BF16):
        expected = norm(x)
        with GPUKernels(mixed=True):
            if at_once:
                with cast_weights([norm], torch.bfloat16):
                    assert norm.weight.dtype == torch.bfloat16
                    found = norm(x)
            else:
                found = norm(x)
            assert torch.nn.functional.layer_norm(x, (32,)).dtype == torch.float32  # what is emulated
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.04)


def test_maps_are_in_half_precision_on_a_gpu():
    """No float32 map between two layers, where each would be cast again."""
    encoder = make_model("none").encoder
    dtypes = set()
    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, inputs, output: dtypes.update((inputs[0].dtype, output.dtype)))
    with torch.autocast(**CPU_BF16), GPUKernels(mixed=True), cast_weights([encoder], torch.bfloat16):
        maps = encoder(torch.randn(1, 3, 64, 64).bfloat16())
    assert dtypes == {each.dtype for each in maps} == {torch.bfloat16}


def test_drop_path_grows_with_depth():
    assert [block.drop_path for block in MiT(SIZES["mit_b0"], 0.1).blocks] == pytest.approx(
        [0.1 * i / 7 for i in range(8)]
    )


def test_dropout_of_the_decoder():
    """Whole channels of an image are dropped before the classifier, at the rate of the recipe."""
    model, seen = make_model("none", dropout=0.25), []
    model.decoder.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for _ in range(10):
        model(torch.randn(2, 3, 64, 64))
    ratios = torch.stack([(after / before).flatten(2) for before, after in seen])  # (passes, B, C, H * W)
    ratios = torch.where(ratios.isnan(), ratios.nanmean(-1, keepdim=True), ratios)  # 0 / 0 after ReLU
    ratios = ratios[~ratios.isnan().any(-1)]
    dropped, kept = (ratios == 0).all(-1), (ratios - 4 / 3).abs().amax(-1) < 1e-3
    assert (dropped | kept).all() and 0.15 < dropped.float().mean() < 0.35
