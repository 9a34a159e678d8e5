"""Building networks on the meta device, to compare shapes with an untrusted file without allocating them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SkipNormal(TorchFunctionMode):
    """Leaves out `normal_`, for which torch imports a thousand modules if the device is meta."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which modules get shapes but no storage: a recipe may ask for a network of any size."""
    with torch.device("meta"), SkipNormal(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # only shapes are compared
        yield
