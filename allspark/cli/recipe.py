"""The words by which train.py and the verbs name a recipe, and the recipe that they mean."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

from allspark import distributed
from allspark.config import CriterionConfig, MethodConfig, Recipe
from allspark.config_io import (
    CONFIG_ROOT,
    bind_options,
    differences,
    load_config,
    load_recipe,
    parse_overrides,
    to_plain,
)
from allspark.data.base import DatasetSpec
from allspark.data.batch import Views
from allspark.data.loaders import TrainLoader
from allspark.data.splits import Lists
from allspark.engine.optim import scale_lr
from allspark.engine.stepper import pass_size
from allspark.losses import build_criterion
from allspark.methods import METHODS, Method
from allspark.utils.errors import UserError


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The resolved recipe, all options of its method in it; UserError for an unknown key, method or option."""
    overrides = parse_overrides(args.overrides)
    for key in ("split", "labeled_id_path", "unlabeled_id_path"):
        if (value := getattr(args, key)) is not None:
            overrides[f"data.{key}"] = value
    if args.config is not None and not args.dataset:
        return complete(load_config(args.config, overrides, args.method))
    if args.dataset and args.method and args.config is None:
        return complete(load_recipe(args.dataset, args.method, overrides))
    raise UserError("give --dataset and --method, or --config FILE for a whole recipe (with --method: another one's)")


def command(args: argparse.Namespace) -> str:
    """The words of recipe_of, as a shell takes them."""
    names = ("dataset", "method", "config", "split", "labeled_id_path", "unlabeled_id_path")
    given = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in names]
    words = [word for option, value in given if value is not None for word in (option, str(value))]
    return shlex.join([*words, *args.overrides])


def changes(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """What differs from the recipe's files in configs/, as lines of a table; which images are trained on is no part."""
    if args.config is not None:
        plain = recipe.method.name == "allspark" and recipe.model.bottleneck.name == "none" and args.method is None
        return ["method allspark without its bottleneck is self-training; with it: --method allspark"] if plain else []
    published = complete(load_recipe(args.dataset, args.method))
    lists = [f"data.{name}" for name in ("split", "labeled_id_path", "unlabeled_id_path", "val_id_path", "data_root")]
    changed = [line.partition(": ") for line in differences(to_plain(published), to_plain(recipe))]
    rows = [(key, *values.split(" -> ")) for key, _, values in changed if key not in (*lists, "optim.lr_batch")]
    lr = scale_lr(recipe.optim, recipe.batch_size).lr
    if lr != recipe.optim.lr:
        there, here = f"{recipe.optim.lr:g} (batch {recipe.optim.lr_batch})", f"{lr:g} (batch {recipe.batch_size})"
        rows.append(("learning rate", there, here))
    if not rows:
        return ["the recipe is that of configs/"]
    table = [("differs from configs/", "there", "here"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in table]


def batch_in_words(recipe: Recipe, processes: int) -> str:
    """8 labeled images (2 processes x 2 passes x 2 images)."""
    size, share = pass_size(recipe, processes), recipe.batch_size // processes
    factors = [f"{processes} processes"] * (processes > 1) + [f"{share // size} passes"] * (share > size)
    inside = f" ({' x '.join((*factors, f'{size} images'))})" if factors else ""
    return f"{recipe.batch_size} labeled images{inside}"


def complete(recipe: Recipe) -> Recipe:
    """The recipe with all options of its method, given or by default."""
    name = recipe.method.name
    if name not in METHODS:
        is_recipe = (CONFIG_ROOT / "methods" / f"{name}.yaml").is_file()
        hint = f"; --method {name}, behind --config FILE, too, takes the recipe of that name" if is_recipe else ""
        raise UserError(f"method.name={name}: unknown method; one of {', '.join(METHODS)}{hint}")
    options = bind_options(METHODS[name].__init__, recipe.method.options, "method")
    return replace(recipe, method=MethodConfig(name=name, options=options))


def build_method(recipe: Recipe, spec: DatasetSpec) -> Method:
    """The method with its options; it refuses a model that it cannot train."""
    kind = METHODS[recipe.method.name]
    check_class_weights(recipe.criterion, spec)
    criterion = build_criterion(ignore_index=spec.ignore_index, **vars(recipe.criterion))
    if not kind.takes_bottleneck and recipe.model.bottleneck.name != "none":
        raise UserError(
            f"method {recipe.method.name} with model.bottleneck={recipe.model.bottleneck.name}: the bottleneck's "
            f"unlabeled branch would never get a gradient; set model.bottleneck=none or choose another method"
        )
    facts = {name: getattr(spec, name) for name in kind.facts}
    return kind(criterion, **facts, **recipe.method.options)


def check_class_weights(criterion: CriterionConfig, spec: DatasetSpec) -> None:
    """One for each class, and for a loss that has them."""
    weights = criterion.class_weights
    if weights is None:
        return
    if criterion.name != "ce":
        raise UserError(
            f"criterion.class_weights with criterion={criterion.name}, which chooses pixels itself; use criterion=ce"
        )
    if len(weights) != spec.num_classes or not all(0 <= weight <= 1e6 for weight in weights) or not any(weights):
        raise UserError(
            f"criterion.class_weights={list(weights)}: give {spec.num_classes} numbers from 0 on, not all 0, in the "
            f"order {', '.join(spec.classes)}"
        )


def build_loader(recipe: Recipe, lists: Lists, spec: DatasetSpec, views: Views) -> TrainLoader:
    """This process's share of the training batches; UserError where no batch can be made."""
    return TrainLoader(
        lists,
        spec,
        recipe.data,
        views,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        epoch_of=recipe.epoch_of,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
