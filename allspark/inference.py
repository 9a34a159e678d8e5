"""From a checkpoint file to a network that predicts, and the words that name both: what eval.py and the verbs share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allspark.cli.recipe import build_method, complete
from allspark.config import Recipe
from allspark.config_io import build_recipe, load_recipe, to_plain
from allspark.data import DATASETS, spec_for
from allspark.data.base import IGNORE_INDEX, DatasetSpec, bit_palette
from allspark.engine.checkpoint import is_imported, load_checkpoint, load_state
from allspark.engine.stepper import autocast, set_precision
from allspark.evaluation.sliding_window import Inference, inference_for
from allspark.models.segmentor import build_model
from allspark.utils.download import file_digest
from allspark.utils.errors import UserError

ANY_CROP = 64  # to build a model with, where nothing tells the crop: a model without a memory has no use for it


@dataclass(frozen=True)
class Loaded:
    """The network that predicts, in evaluation mode, and what is known of it.

    recipe: that of the training; of imported weights the data set's, or None where no data set was named.
    crop_size: the training crop, None where nothing tells it.
    meta: sha256 of the file, and step, epoch, split of a training or source of imported weights.
    """

    model: nn.Module
    spec: DatasetSpec
    recipe: Recipe | None
    crop_size: int | None
    meta: dict[str, Any]

    def inference(self, mode: str | None = None, **options: Any) -> Inference:
        """How it takes an image: `mode`, else the recipe's, else the data set's; the window is the training crop."""
        if self.recipe is not None:
            evaluation = self.recipe.evaluation
            return inference_for(self.spec, self.crop_size, mode or evaluation.mode, evaluation.window, **options)
        if mode not in (None, "whole") and self.crop_size is None:
            raise UserError(f"--mode {mode}: these imported weights do not tell the window; name their --dataset")
        return inference_for(self.spec, self.crop_size, mode, **options)


def computing(args: argparse.Namespace, device: torch.device) -> AbstractContextManager:
    """Forward passes in here are of --precision; UserError for one that the device does not have."""
    set_precision(args.precision, device)
    return autocast(args.precision, device)


def load_for_inference(path: str | Path, device: torch.device, dataset: str | None = None) -> Loaded:
    """The network of a checkpoint, of train.py or imported. UserError: missing, truncated, foreign, not fitting.

    dataset: whose classes imported weights predict; a checkpoint of train.py knows, and refuses another.
    """
    content = load_checkpoint(path)
    loaded = (load_imported if is_imported(content) else load_trained)(content, path, dataset)
    if not all(tensor.isfinite().all() for tensor in loaded.model.state_dict().values()):
        raise UserError(f"{path}: weights in it are NaN or infinite, it predicts nothing; use another checkpoint")
    return replace(loaded, model=loaded.model.to(device).eval(), meta={**loaded.meta, "sha256": file_digest(path)})


def load_trained(content: Mapping[str, Any], path: str | Path, dataset: str | None) -> Loaded:
    """What the method of the run evaluates: the model, or a teacher that lives in the method's own state."""
    with naming(path):
        recipe = complete(build_recipe(content["recipe"], None, "its recipe"))
        spec = spec_for(recipe.data)
        model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
        method = build_method(recipe, spec)
    if dataset not in (None, recipe.data.dataset):
        raise UserError(
            f"--dataset {dataset}: {path} was trained on {recipe.data.dataset}, and knows it; leave --dataset out"
        )
    method.attach(model)
    load_state(model, content["model"], path)
    load_state(method, content["method"], path)
    meta = {"step": content["step"], "epoch": content["epoch"], "split": texts(content, "split", path)}
    return Loaded(method.predictor(model), spec, recipe, recipe.data.crop_size, meta)


def load_imported(content: Mapping[str, Any], path: str | Path, dataset: str | None) -> Loaded:
    """The model of the file's architecture. `pretrained` and `init_from` in it are never looked at."""
    plan, num_classes, stated = read_architecture(content["architecture"], path)
    if dataset is None:
        spec, of_recipe = unnamed_spec(num_classes), ANY_CROP
        base = {"data": {"dataset": spec.name, "data_root": ""}, "method": "supervised", "epochs": 1}
    else:
        spec = spec_of(dataset, num_classes, path)
        # a spec that shares another's lists shares its recipe; the method plays no part in predicting
        base = to_plain(load_recipe(spec.splits, "supervised", {"data.dataset": dataset}))
        of_recipe = base["data"]["crop_size"]
    base["data"]["crop_size"] = stated or of_recipe
    with naming(path):
        recipe = build_recipe({**base, "model": plan}, None, "architecture")  # strict: a wrong key or value is told
        model = build_model(recipe.model, num_classes, recipe.data.crop_size)
    load_state(model, content["model"], path)
    meta = {"source": texts(content, "source", path)}
    if dataset is None:
        return Loaded(model, spec, None, stated, meta)
    crop = training_crop(stated, of_recipe, model.encoder.strides[-1])
    return Loaded(model, spec, replace(recipe, data=replace(recipe.data, crop_size=crop)), crop, meta)


def texts(content: Mapping[str, Any], key: str, path: str | Path) -> dict[str, str]:
    """A section of names and hashes alone."""
    section = content[key]
    if not isinstance(section, Mapping) or not all(isinstance(value, str) for value in section.values()):
        raise UserError(f"{path}: its '{key}' does not hold names and hashes; use another checkpoint")
    return dict(section)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A UserError inside says whose content it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_architecture(content: Any, path: str | Path) -> tuple[Mapping[str, Any], int, int | None]:
    """architecture of an imported checkpoint -> the plain model section of a recipe, class count, crop or None."""
    content = content if isinstance(content, Mapping) else {}
    if missing := [key for key in ("model", "num_classes", "crop_size") if key not in content]:
        raise UserError(f"{path}: its 'architecture' has no '{missing[0]}'; import the weights again")
    num_classes, crop = content["num_classes"], content["crop_size"]
    if type(num_classes) is not int or not 1 <= num_classes <= IGNORE_INDEX:
        raise UserError(f"{path}: architecture.num_classes={num_classes!r} must be 1..{IGNORE_INDEX}, masks are 8-bit")
    if crop is not None and type(crop) is not int:
        raise UserError(f"{path}: architecture.crop_size={crop!r} must be a number of pixels or None")
    return content["model"], num_classes, crop


def spec_of(dataset: str, num_classes: int, path: str | Path) -> DatasetSpec:
    """The spec that --dataset names, of as many classes as the weights have."""
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: there is no such data set; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    if spec.num_classes != num_classes:
        raise UserError(
            f"--dataset {dataset} has {spec.num_classes} classes, {path} predicts {num_classes}: "
            f"{of_so_many_classes(num_classes)}"
        )
    return spec


def of_so_many_classes(num_classes: int) -> str:
    """The data sets that weights with so many classes may belong to, in words."""
    names = [name for name, spec in DATASETS.items() if spec.num_classes == num_classes]
    return f"data sets of {num_classes} classes: {', '.join(names) or 'none'}"


def unnamed_spec(num_classes: int) -> DatasetSpec:
    """Classes by number, in PASCAL VOC's colours."""
    classes = tuple(f"class {index}" for index in range(num_classes))
    return DatasetSpec("unnamed", classes, bit_palette(num_classes))


def training_crop(stated: int | None, of_recipe: int, stride: int = 32) -> int:
    """The crop that imported weights were trained with, which is the side of the sliding window.

    What they state was read off the side of their memory, which is of cells of `stride` pixels, so the recipe's crop
    stands where it means the same side.
    """
    if stated is None or math.ceil(stated / stride) == math.ceil(of_recipe / stride):
        return of_recipe
    return stated
