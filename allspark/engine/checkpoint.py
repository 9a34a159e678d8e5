"""Checkpoints: written atomically, tensors and plain values only, so that they load with weights_only=True.

Of train.py they hold a run: its recipe, the state of model, method and optimizer, where it stands. Imported ones hold
a model, {"model", "architecture": {"model", "num_classes", "crop_size"}, "source": {"format", "file", "sha256"}}.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from allspark.errors import UserError, reason_of

FORMAT = "allspark-1"
TO_PREDICT = ("model", "method", "epoch", "step", "recipe", "split")  # what one of train.py must hold to be evaluated
TO_RESUME = (*TO_PREDICT, "optimizer", "best")
IMPORTED = ("model", "architecture", "source")  # what an imported one holds


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the target, flush to the disk, rename: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, needed: Sequence[str] | None = None) -> dict[str, Any]:
    """What save_checkpoint wrote, on the CPU. No code in the file can run.

    needed: what must be in it; None: what its kind, of train.py or imported, needs to predict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the path of a best.pth or latest.pth")
    try:
        with warnings.catch_warnings():  # torch warns of a pickle that it then refuses
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, bit-flipped, foreign, or holding code: torch raises many kinds
        raise UserError(
            f"{path}: not a readable checkpoint, truncated or of another program ({reason_of(error)}); "
            f"use another one, or train with --fresh to start over"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path}: no checkpoint of this program (format '{FORMAT}'); give one that train.py wrote, "
            f"or bring the weights in: python -m allspark weights import {path} --out FILE"
        )
    check_content(content, needed, path)
    return content


def is_imported(content: Mapping[str, Any]) -> bool:
    return "architecture" in content and "recipe" not in content


def check_content(content: Mapping[str, Any], needed: Sequence[str] | None, path: Path) -> None:
    imported = is_imported(content)
    missing = [key for key in needed or (IMPORTED if imported else TO_PREDICT) if key not in content]
    if missing and imported and needed:
        raise UserError(
            f"{path}: imported weights, no run that could be resumed; "
            f"keep the file elsewhere and start from it with model.init_from=FILE"
        )
    if missing:
        kind = "whole imported checkpoint" if imported else "checkpoint of train.py"
        raise UserError(f"{path}: not a {kind}, it has no '{missing[0]}'; use another one")


def load_state(module: torch.nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """load_state_dict with a mismatch told in one sentence (another class count, crop or encoder).

    Strict but for what a module fills in for itself, such as the count of a memory that was saved without one.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds something else than tensors by name; use another checkpoint")
    own = module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    missing = module.load_state_dict(fitting, strict=False).missing_keys
    wrong = list(dict.fromkeys([*missing, *(name for name in state if name not in fitting)]))
    if wrong:
        name = wrong[0]
        there = tuple(state[name].shape) if name in state else "absent"
        here = tuple(own[name].shape) if name in own else "absent"
        raise UserError(
            f"{path}: does not fit the model of this recipe: {len(wrong)} tensors differ, first {name}: {there} in the "
            f"file, {here} in the model; it was trained with other classes, crop_size or model.* "
            f"(to fine-tune from it: model.init_from)"
        )
