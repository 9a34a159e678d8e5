"""Semi-supervised semantic segmentation: AllSpark and its baselines.

The names below are the public API. They are imported when they are first used, so `import allspark` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allspark.api import build_model, load_checkpoint, predict
    from allspark.config_io import load_config

__version__ = "0.1.0"
__all__ = ["__version__", "build_model", "load_checkpoint", "load_config", "predict"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("allspark.config_io" if name == "load_config" else "allspark.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
