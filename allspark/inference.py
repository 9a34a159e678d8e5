"""Load a checkpoint for inference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allspark.build import build_method, complete
from allspark.config import Recipe, Size, height_width
from allspark.config_io import build_recipe, load_recipe, to_plain
from allspark.data.datasets import DATASETS, spec_for
from allspark.data.spec import IGNORE_INDEX, DatasetSpec, voc_palette
from allspark.engine.checkpoint import checkpoint_in, is_imported, load_checkpoint, load_state
from allspark.engine.stepper import autocast, set_precision
from allspark.evaluation.sliding_window import Inference, inference_for
from allspark.hub import is_model, read_model
from allspark.models.segmentor import Segmentor, build_model
from allspark.models.shapes_only import shapes_only
from allspark.utils.download import file_digest
from allspark.utils.errors import UserError
from allspark.utils.safe_load import has_valid_values

ANY_CROP = 64  # used if the crop size is unknown; it affects only the memory's shape


@dataclass(frozen=True)
class InferenceModel:
    """A network for inference, in evaluation mode, and what is known about it.

    Args:
        model: image (B, 3, H, W), normalized, -> SegOutput.
        spec: data set whose classes it predicts.
        recipe: of its training; of imported weights that of the data set, or None if no data set was given.
        crop_size: of the training crops; None if unknown.
        meta: sha256 of the file, and step, epoch and split of a run or the source of imported weights.
    """

    model: nn.Module
    spec: DatasetSpec
    recipe: Recipe | None
    crop_size: Size | None
    meta: dict[str, Any]

    def inference(self, mode: str | None = None, **options: Any) -> Inference:
        """How images are predicted.

        Args:
            mode: whole, center_crop or sliding_window; default: the recipe's, else the data set's.
            **options: further fields of Inference: windows, scales and flip.
        """
        if self.recipe is not None:
            return inference_for(self.spec, self.crop_size, self.recipe.evaluation, mode=mode, **options)
        if mode not in (None, "whole") and self.crop_size is None:
            raise UserError(
                f"--mode {mode}: the window size of these imported weights is unknown; give their --dataset"
            )
        return inference_for(self.spec, self.crop_size, mode=mode, **options)


def precision_context(precision: str, device: torch.device) -> AbstractContextManager:
    """Context for forward passes in this precision; UserError if the device does not support it."""
    set_precision(precision, device)
    return autocast(precision, device)


def load_for_inference(
    path: str | Path, device: torch.device, dataset: str | None = None, best: bool = False
) -> InferenceModel:
    """Load the network of a checkpoint.

    Args:
        path: folder of a run, a checkpoint of train.py or `weights import`, or a folder or hf:// address of
            `weights push`.
        device: of the network.
        dataset: data set whose classes imported weights predict; a checkpoint of train.py only accepts its own.
        best: of a run, the epoch with the best mIoU on val instead of the last one.

    Raises:
        UserError: the file is missing, damaged, of another program, or does not match.
    """
    if is_model(path):
        if best:
            raise UserError(f"--best needs the folder of a run, and {path} is one model; omit --best")
        path, content = read_model(path)
    else:
        path = checkpoint_in(path, best)
        content = load_checkpoint(path)
    loaded = (load_imported if is_imported(content) else load_trained)(content, path, dataset)
    if not all(map(has_valid_values, loaded.model.state_dict().values())):
        raise UserError(f"{path}: contains weights that are NaN, infinite or huge; use another checkpoint")
    return replace(loaded, model=loaded.model.to(device).eval(), meta={**loaded.meta, "sha256": file_digest(path)})


def load_trained(content: Mapping[str, Any], path: str | Path, dataset: str | None) -> InferenceModel:
    """The network that the method of the run evaluates: the model, or a teacher from the method's state.

    A file of `weights export` holds this network alone, and None as its method.
    """
    network_only = content["method"] is None

    def load() -> nn.Module:
        with prefix_errors(path):
            model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels)
            method = None if network_only else build_method(recipe, spec)
        if method is None:
            network = model.inference_copy()
            load_state(network, content["model"], path)
            return network
        method.attach(model)
        load_state(model, content["model"], path)
        load_state(method, content["method"], path)
        return method.predictor(model)

    with prefix_errors(path):
        recipe = build_recipe(content["recipe"], None, "its recipe")
        recipe = recipe if network_only else complete(recipe)
        spec = spec_for(recipe.data)
    if dataset not in (None, recipe.data.dataset):
        raise UserError(f"--dataset {dataset}: {path} was trained on {recipe.data.dataset}; omit --dataset")
    with shapes_only():
        load()
    meta = {"step": content["step"], "epoch": content["epoch"], "split": string_section(content, "split", path)}
    return InferenceModel(load(), spec, recipe, recipe.data.crop_size, meta)


def load_imported(content: Mapping[str, Any], path: str | Path, dataset: str | None) -> InferenceModel:
    """The model of an imported checkpoint; `pretrained` and `init_from` of its architecture are ignored."""
    architecture, num_classes, stated = read_architecture(content["architecture"], path)
    if dataset is None:
        spec, recipe_crop = unnamed_spec(num_classes), ANY_CROP
        base = {"data": {"dataset": spec.name, "data_root": ""}, "method": "supervised", "epochs": 1}
    else:
        spec = spec_by_name(dataset, num_classes, path)
        # A spec that shares another's lists shares its recipe; the method does not matter for inference
        base = to_plain(load_recipe(spec.splits, "supervised", {"data.dataset": dataset}))
        recipe_crop = base["data"]["crop_size"]
    base["data"]["crop_size"] = stated or recipe_crop

    def load() -> Segmentor:
        with prefix_errors(path):
            model = build_model(recipe.model, num_classes, recipe.data.crop_size)
        load_state(model, content["model"], path)
        return model

    with prefix_errors(path):
        recipe = build_recipe({**base, "model": architecture}, None, "architecture")  # refuses unknown keys and values
    with shapes_only():
        load()
    model = load()
    meta = {"source": string_section(content, "source", path)}
    if dataset is None:
        return InferenceModel(model, spec, None, stated, meta)
    crop = training_crop(stated, recipe_crop, model.encoder.strides[-1])
    return InferenceModel(model, spec, replace(recipe, data=replace(recipe.data, crop_size=crop)), crop, meta)


def string_section(content: Mapping[str, Any], key: str, path: str | Path) -> dict[str, str]:
    """A section of a checkpoint that contains names and hashes only."""
    section = content[key]
    if not isinstance(section, Mapping) or not all(isinstance(value, str) for value in section.values()):
        raise UserError(f"{path}: its '{key}' does not hold names and hashes; use another checkpoint")
    return dict(section)


@contextmanager
def prefix_errors(path: str | Path) -> Iterator[None]:
    """Context that adds the path of the file to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_architecture(content: Any, path: str | Path) -> tuple[Mapping[str, Any], int, Size | None]:
    """The model section of a recipe, the number of classes and the crop size (or None) of an imported checkpoint."""
    content = content if isinstance(content, Mapping) else {}
    if missing := [key for key in ("model", "num_classes", "crop_size") if key not in content]:
        raise UserError(f"{path}: its 'architecture' has no '{missing[0]}'; import the weights again")
    num_classes, crop = content["num_classes"], content["crop_size"]
    if type(num_classes) is not int or not 1 <= num_classes <= IGNORE_INDEX:
        raise UserError(f"{path}: architecture.num_classes={num_classes!r} must be 1..{IGNORE_INDEX}, masks are 8-bit")
    sides = crop if isinstance(crop, list | tuple) and len(crop) == 2 else [crop]
    if crop is not None and not all(type(side) is int for side in sides):
        raise UserError(f"{path}: architecture.crop_size={crop!r} must be a number of pixels, two or None")
    return content["model"], num_classes, tuple(crop) if isinstance(crop, list) else crop


def spec_by_name(dataset: str, num_classes: int, path: str | Path) -> DatasetSpec:
    """The spec of --dataset; UserError unless it has as many classes as the weights."""
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: no such data set; choose one of {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    if spec.num_classes != num_classes:
        raise UserError(
            f"--dataset {dataset} has {spec.num_classes} classes, {path} predicts {num_classes}: "
            f"{datasets_with(num_classes)}"
        )
    return spec


def datasets_with(num_classes: int) -> str:
    """For a message: the data sets with this number of classes."""
    names = [name for name, spec in DATASETS.items() if spec.num_classes == num_classes]
    return f"data sets of {num_classes} classes: {', '.join(names) or 'none'}"


def unnamed_spec(num_classes: int) -> DatasetSpec:
    """Numbered classes in the colors of PASCAL VOC."""
    classes = tuple(f"class {index}" for index in range(num_classes))
    return DatasetSpec("unnamed", classes, voc_palette(num_classes))


def training_crop(stated: Size | None, recipe_crop: Size, stride: int = 32) -> Size:
    """The crop size that imported weights were trained with, which is the side of the sliding window.

    Args:
        stated: derived from the side of their memory, in cells of `stride` pixels, and exact only to a cell; None if
            unknown.
        recipe_crop: that of the data set's recipe, which is preferred if it gives the same number of cells.
        stride: of the deepest feature map.
    """

    def cells(crop: Size) -> list[int]:
        return [math.ceil(side / stride) for side in height_width(crop)]

    return recipe_crop if stated is None or cells(stated) == cells(recipe_crop) else stated
