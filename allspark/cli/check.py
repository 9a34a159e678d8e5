"""python -m allspark check: what train.py checks at its start, without the training."""

from __future__ import annotations

import argparse

from allspark.cli import recipe as recipe_words
from allspark.data import spec_for
from allspark.data.preflight import check_data, hidden_sample
from allspark.data.splits import provenance, resolve
from allspark.evaluation.inference import inference_for
from allspark.models.segmentor import build_model
from allspark.models.weights import load_pretrained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_words.add_arguments(parser)


def main(args: argparse.Namespace) -> None:
    recipe = recipe_words.recipe_of(args)
    spec = spec_for(recipe.data)
    method = recipe_words.build_method(recipe, spec)
    lists = resolve(recipe.data)
    notes = [*provenance(lists, spec), *check_data(recipe.data, spec, lists)]
    notes += hidden_sample(lists, spec, recipe.evaluation.pseudo_labels)[1]
    recipe_words.build_loader(recipe, lists, spec, method.views)
    inference_for(spec, recipe.data.crop_size, recipe.evaluation.mode, recipe.evaluation.window)
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
    notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
    print("\n".join((*notes, "nothing that would stop this run was found")))
