"""Build the method and the loader of a recipe."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace

from allspark import distributed
from allspark.config import CriterionConfig, MethodConfig, Recipe
from allspark.config_io import CONFIG_ROOT
from allspark.config_keys import bind_options
from allspark.data.batch import Views
from allspark.data.loaders import TrainLoader
from allspark.data.spec import DatasetSpec
from allspark.data.splits import Lists
from allspark.losses import build_criterion
from allspark.methods import METHODS, Method
from allspark.utils.errors import UserError

TRUSTED = "ALLSPARK_METHODS"  # environment variable: outside methods that checkpoints may name, separated by commas


def method_class(name: str, trusted: bool = False) -> type[Method]:
    """The class of a method.

    Args:
        name: a key of METHODS, or package.module:Class.
        trusted: the name was given by the user. A name from a checkpoint must be in TRUSTED, or its module imported
            already: to import a module is to run its code.

    Raises:
        UserError: there is no such method, or it is not trusted.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        is_recipe = (CONFIG_ROOT / "methods" / f"{name}.yaml").is_file()
        hint = f"; --method {name} selects the recipe of that name, also together with --config FILE"
        raise UserError(
            f"method.name={name}: unknown method; choose one of {', '.join(METHODS)}, or package.module:Class"
            f"{hint if is_recipe else ''}"
        )
    if not (trusted or module in sys.modules or name in os.environ.get(TRUSTED, "").split(",")):
        raise UserError(f"method.name={name}: code from outside of this package; if you trust it, set {TRUSTED}={name}")
    try:
        kind = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(
            f"method.name={name}: {module} cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"method.name={name}: {module} has no class {attribute} derived from allspark.methods.Method")
    return kind


def complete(recipe: Recipe, trusted: bool = False) -> Recipe:
    """The recipe with all options of its method, given or by default.

    Args:
        trusted: import a method from outside of this package; see `method_class`.

    Raises:
        UserError: unknown method or option.
    """
    kind = method_class(recipe.method.name, trusted)
    options = bind_options(kind, recipe.method.options, "method")
    return replace(recipe, method=MethodConfig(name=recipe.method.name, options=options))


def build_method(recipe: Recipe, spec: DatasetSpec) -> Method:
    """The method of a complete recipe.

    Raises:
        UserError: the method cannot train the model of the recipe, or its criterion does not match the data set.
    """
    kind = method_class(recipe.method.name)
    check_class_weights(recipe.criterion, spec)
    criterion = build_criterion(ignore_index=spec.ignore_index, **vars(recipe.criterion))
    method = kind(criterion, **{name: getattr(spec, name) for name in kind.spec_fields}, **recipe.method.options)
    if not method.views.unlabeled and recipe.model.bottleneck.name != "none":
        raise UserError(
            f"method {recipe.method.name} with model.bottleneck={recipe.model.bottleneck.name}: without unlabeled "
            f"images the bottleneck's unlabeled branch gets no gradient; set model.bottleneck=none or choose another "
            f"method"
        )
    return method


def check_schedule(recipe: Recipe, method: Method) -> None:
    """UserError if a run ends before the method uses unlabeled images, before the memory is read or it is evaluated.

    Not part of build_method, because an existing run of this kind can still be evaluated.
    """
    bottleneck = recipe.model.bottleneck
    for key, value, effect, other in (
        ("burn_in_epochs", recipe.burn_in_epochs, "no unlabeled image is ever used", "use --method supervised"),
        (
            "model.bottleneck.warmup_epochs",
            (bottleneck.name != "none" and bottleneck.warmup_epochs) or 0,
            "the memory is never read",
            "to null to never read it",
        ),
    ):
        if method.views.unlabeled and value >= recipe.epochs:
            raise UserError(
                f"{key}={value} and epochs={recipe.epochs}: {effect} (epoch counts are not rescaled when epochs "
                f"changes); set {key} below {recipe.epochs}, or {other}"
            )
    patience, interval = recipe.evaluation.patience, recipe.evaluation.interval
    if patience is not None and patience < interval:
        raise UserError(
            f"evaluation.patience={patience} would end the run between two evaluations; set at least "
            f"evaluation.interval={interval}"
        )
    warmup = bottleneck.warmup_epochs if bottleneck.name != "none" and bottleneck.context == "labeled" else None
    if warmup is not None and warmup <= recipe.burn_in_epochs:  # reads before it writes
        raise UserError(
            f"model.bottleneck.context=labeled with model.bottleneck.warmup_epochs={warmup}: a memory that was never "
            f"written would be read; set model.bottleneck.warmup_epochs above burn_in_epochs={recipe.burn_in_epochs}"
        )


def check_class_weights(criterion: CriterionConfig, spec: DatasetSpec) -> None:
    """UserError unless there is one weight per class, and a loss that uses them."""
    weights = criterion.class_weights
    if weights is None:
        return
    if criterion.name != "ce":
        raise UserError(
            f"criterion.class_weights with criterion={criterion.name}, which selects pixels itself; use criterion=ce"
        )
    if len(weights) != spec.num_classes or not all(0 <= weight <= 1e6 for weight in weights) or not any(weights):
        raise UserError(
            f"criterion.class_weights={list(weights)}: give {spec.num_classes} numbers of at least 0, not all 0, in "
            f"the order {', '.join(spec.classes)}"
        )


def build_loader(recipe: Recipe, lists: Lists, spec: DatasetSpec, views: Views) -> TrainLoader:
    """This process's share of the training batches; UserError if no batch can be made."""
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
