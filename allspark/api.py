"""The public functions of the package that need torch: from a recipe to a model, from a checkpoint to a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from allspark.config import Recipe
from allspark.data.datasets import spec_for
from allspark.data.image_io import read_image
from allspark.data.transforms import to_tensor
from allspark.device import choose_device
from allspark.evaluation import evaluate
from allspark.inference import InferenceModel, load_for_inference
from allspark.models import segmentor
from allspark.utils.errors import UserError


def build_model(recipe: Recipe) -> segmentor.Segmentor:
    """The model of a recipe, with random weights."""
    spec = spec_for(recipe.data)
    return segmentor.build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels)


def load_checkpoint(path: str | Path, device: str = "auto", dataset: str | None = None) -> InferenceModel:
    """A trained model in evaluation mode, with the classes and the recipe of its training.

    Args:
        path: folder of a run, whose last epoch is used, or a checkpoint of train.py or of `allspark weights import`.
        device: auto, cuda, mps or cpu.
        dataset: data set of imported weights, which do not know it.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    return load_for_inference(path, choose_device(device), dataset)


def predict(
    model: InferenceModel, image: np.ndarray | str | Path, mode: str | None = None, **options: Any
) -> np.ndarray:
    """The class of each pixel of an image.

    Args:
        model: from load_checkpoint.
        image: (H, W, C) uint8, RGB if C is 3, or the path of an image file.
        mode: whole, sliding_window or center_crop; default: that of the recipe, else that of the data set.
        options: scales=(0.75, 1.0) and flip=True average several predictions.

    Returns:
        (H, W) uint8 class indices, of model.spec.classes.

    Raises:
        UserError: the array has another shape or dtype, or the file cannot be read.
    """
    if not isinstance(image, str | Path):
        check_pixels(image, model.spec.channels)
        pixels, name = image, "image"
    else:
        pixels, name = read_image(Path(image), model.spec.reading), str(image)
    device, inference = next(model.model.parameters()).device, model.inference(mode, **options)
    masks = evaluate.predict(model.model, to_tensor(pixels)[None], model.spec, device, inference, [name])
    return masks[0].cpu().numpy()


def check_pixels(image: object, channels: int) -> None:
    """Raise UserError unless the array is an image with so many channels."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"image: is a {type(image).__name__}, must be an array (H, W, {channels}) of uint8, or a path")
    if image.ndim != 3 or image.shape[2] != channels or image.dtype != np.uint8 or image.size == 0:
        raise UserError(
            f"image: an array of shape {image.shape} and dtype {image.dtype}, must be a non-empty image of shape "
            f"(H, W, {channels}) and dtype uint8; give the path to have it read as in training"
        )
