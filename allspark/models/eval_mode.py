"""Run a network for prediction in the middle of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own training flag back.

    The forward passes change no buffer. Uses no_grad and not inference_mode, so that a tensor which a module caches
    meanwhile remains usable in training.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        # Autocast of older torch (2.8, for example) would reuse the weights that were cast here, without gradients, in
        # the next training pass: they would never be trained
        torch.clear_autocast_cache()
