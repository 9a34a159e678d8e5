"""From a checkpoint file to a network that predicts: what eval.py and the verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allspark.config import Recipe, build_recipe
from allspark.data import spec_for
from allspark.data.base import DatasetSpec
from allspark.engine.checkpoint import file_sha256, load_checkpoint, load_state
from allspark.models.segmentor import Segmentor, build_model


@dataclass(frozen=True)
class Loaded:
    """A trained network in evaluation mode with the recipe and data set it was trained on.

    meta: step, epoch, split {name, sha256}, and sha256 of the file.
    """

    model: Segmentor
    recipe: Recipe
    spec: DatasetSpec
    meta: dict[str, Any]


def load_for_inference(path: str | Path, device: torch.device) -> Loaded:
    """The network of a checkpoint of train.py. UserError: missing, truncated, foreign, or not fitting its recipe."""
    content = load_checkpoint(path)
    recipe = build_recipe(content["recipe"], None, str(path))
    spec = spec_for(recipe.data)
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
    load_state(model, content["model"], path)
    meta = {key: content[key] for key in ("step", "epoch", "split")}
    return Loaded(model.to(device).eval(), recipe, spec, {**meta, "sha256": file_sha256(path)})
