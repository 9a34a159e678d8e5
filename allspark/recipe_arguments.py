"""Command-line arguments that select a recipe, shared by train.py and the verbs."""

from __future__ import annotations

import argparse
import contextlib
import shlex

from allspark.build import complete
from allspark.config import Recipe
from allspark.config_io import differences, load_config, load_recipe, parse_overrides, to_plain
from allspark.engine.optim import scale_lr
from allspark.utils.errors import UserError


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The complete recipe of the arguments; UserError for an unknown key, method or option."""
    overrides = parse_overrides(args.overrides)
    if args.split is not None:  # takes precedence over the lists of a file
        overrides = {"data.labeled_id_path": None, "data.unlabeled_id_path": None, **overrides}
    for key in ("split", "labeled_id_path", "unlabeled_id_path"):
        if (value := getattr(args, key)) is not None:
            overrides[f"data.{key}"] = value
    if args.config is not None and not args.dataset:
        return complete(load_config(args.config, overrides, args.method), trusted=True)
    if args.dataset and args.method and args.config is None:
        return complete(load_recipe(args.dataset, args.method, overrides), trusted=True)
    raise UserError("give --dataset and --method, or --config FILE for a complete recipe (optionally with --method)")


def command(args: argparse.Namespace) -> str:
    """The arguments of recipe_of as a shell command line."""
    names = ("dataset", "method", "config", "split", "labeled_id_path", "unlabeled_id_path")
    given = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in names]
    argv = [part for option, value in given if value is not None for part in (option, str(value))]
    return shlex.join([*argv, *args.overrides])


def changes(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    """The differences from the recipe in configs/, or in --config, as lines of a table; without lists and data_root."""
    source = "configs/" if args.config is None else args.config
    written = _without_overrides(args)
    if written is None:
        return [f"{source} is complete only with these arguments"]
    ignored = [f"data.{name}" for name in ("split", "labeled_id_path", "unlabeled_id_path", "val_id_path", "data_root")]
    changed = differences(to_plain(written), to_plain(recipe))
    if recipe.micro_batch != written.micro_batch:  # a resumed run may change it, but it is no detail of the machine
        changed.append(("micro_batch", written.micro_batch, recipe.micro_batch))
    rows = [(key, str(old), str(new)) for key, old, new in changed if key not in (*ignored, "optim.lr_batch")]
    lr = scale_lr(recipe.optim, recipe.batch_size).lr
    if lr != recipe.optim.lr and lr != scale_lr(written.optim, written.batch_size).lr:
        old, new = f"{recipe.optim.lr:g} (batch {recipe.optim.lr_batch})", f"{lr:g} (batch {recipe.batch_size})"
        rows.append(("learning rate", old, new))
    if not rows:
        return [f"the recipe is that of {source}"]
    table = [(f"differs from {source}", "there", "here"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in table]


def _without_overrides(args: argparse.Namespace) -> Recipe | None:
    """The recipe of configs/, or of --config with its own method if it has one of this package; None: incomplete."""
    if args.config is None:
        return complete(load_recipe(args.dataset, args.method))
    for method in (None, args.method):
        with contextlib.suppress(UserError):
            return complete(load_config(args.config, None, method), trusted=method == args.method)
    return None
