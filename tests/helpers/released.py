"""Weights and inputs of the recorded numbers in tests/golden/data, and the released names of the weights."""

import json
import math
import zlib

import numpy as np
import torch

from allspark.weights.key_maps import RELEASED
from helpers import REPO

GOLDEN = REPO / "tests" / "golden" / "data"
NAMES = json.loads((GOLDEN / "names.json").read_text())


def rename_released(name):
    """Our name for a tensor of the released code or the original mit_b*.pth; unknown names are unchanged."""
    return RELEASED.translate(name) or name


def formula(name, shape):
    n = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("queue_ptr", "num_batches_tracked")):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith("kv_queue"):
        pass
    elif name.endswith("bias"):
        n = 0.05 * n
    elif len(shape) == 1:
        n = 1 + 0.1 * n
    else:
        n = n / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def image(seed, batch, height, width):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, 3, height, width)).astype(np.float32))


def label(seed, batch, height, width, classes):
    mask = np.random.RandomState(seed).randint(0, classes, (batch, height, width))
    mask[np.random.RandomState(seed + 1).rand(batch, height, width) < 0.1] = 255
    return torch.from_numpy(mask)


def close(actual, recorded, tolerance=1e-4):
    recorded = torch.from_numpy(np.asarray(recorded))
    assert actual.shape == recorded.shape
    assert (actual - recorded).abs().max() / recorded.abs().max() < tolerance
