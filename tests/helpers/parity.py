"""Networks of other packages: weights to compare with, and the comparison."""

import torch

TOLERANCE = 1e-5  # of the largest value


def filled(module):
    """Random weights that keep the variance of signals at 1; biases and norms differ from 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim > 1:
                tensor.uniform_(-1, 1).mul_((3 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.8, 1.2)
            elif name.endswith(("bias", "running_mean")):
                tensor.uniform_(-0.1, 0.1)
    return module.eval()


def same_maps(ours, theirs):
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() < TOLERANCE * other.abs().max()
        assert other.std() > 0.1
