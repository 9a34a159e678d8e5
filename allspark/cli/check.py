"""python -m allspark check: what train.py checks at its start, without the training, and the memory of a step."""

from __future__ import annotations

import argparse

import torch

from allspark.bench.memory import GB, StepMemory, measure_step, predict_step, resident_peak, room
from allspark.cli import recipe as recipe_words
from allspark.config import Recipe
from allspark.data import spec_for
from allspark.data.base import DatasetSpec
from allspark.data.preflight import check_data, hidden_sample
from allspark.data.splits import provenance, resolve
from allspark.distributed import choose_device
from allspark.engine.step import set_precision
from allspark.errors import UserError
from allspark.evaluation.inference import inference_for
from allspark.models.segmentor import build_model
from allspark.models.weights import load_pretrained

REMEDIES = "a smaller batch_size or crop_size, precision=bf16 or model.checkpointing=true takes less"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe_words.add_arguments(parser)
    parser.add_argument("--processes", type=int, default=1, help="that share the batch: predict the memory of one")
    parser.add_argument("--dry-run", action="store_true", help="take two real steps, too, and tell their memory")


def main(args: argparse.Namespace) -> None:
    recipe = recipe_words.recipe_of(args)
    spec = spec_for(recipe.data)
    method = recipe_words.build_method(recipe, spec)
    if args.processes < 1 or recipe.batch_size % args.processes:
        raise UserError(f"--processes {args.processes}: give a number that divides batch_size={recipe.batch_size}")
    lists = resolve(recipe.data)
    notes = [*provenance(lists, spec), *check_data(recipe.data, spec, lists)]
    notes += hidden_sample(lists, spec, recipe.evaluation.pseudo_labels)[1]
    recipe_words.build_loader(recipe, lists, spec, method.views)
    inference_for(spec, recipe.data.crop_size, recipe.evaluation.mode, recipe.evaluation.window)
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
    notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
    notes += predicted(recipe, spec, args.processes)
    if args.dry_run:
        notes += measured(recipe, spec)
    print("\n".join((*notes, "nothing that would stop this run was found")))


def predicted(recipe: Recipe, spec: DatasetSpec, processes: int) -> list[str]:
    """On the device that the recipe names; auto: on a GPU where this machine has one."""
    gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    kind = "cuda" if gpu else "cpu"
    memory = predict_step(recipe, spec, recipe_words.build_method(recipe, spec), kind, processes)
    share = f"{recipe.batch_size // processes} labeled images, one of {processes} process(es)"
    context = "; the CUDA context and the allocator's gaps come on top" if gpu else ""
    return [f"memory of a training step on {kind}, {share}: predicted {memory}{context}", *warning(memory, kind)]


def warning(memory: StepMemory, kind: str) -> list[str]:
    free = room(kind)
    if free is None or memory.peak < free:
        return []
    return [f"WARNING: that is more than the {free / GB:.2f} GB that are free on this {kind}; {REMEDIES}"]


def measured(recipe: Recipe, spec: DatasetSpec) -> list[str]:
    device = choose_device(recipe.device)
    set_precision(recipe.precision, device)
    try:
        memory = measure_step(recipe, spec, recipe_words.build_method(recipe, spec), device)
    except RuntimeError as error:
        if "allocate" not in str(error):  # as both GPUs and main memory say it
            raise
        raise UserError(f"--dry-run: {str(error).splitlines()[0]}; {REMEDIES}") from None
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return [f"measured by two steps: {memory}; torch's allocator reserved {reserved / GB:.2f} GB"]
    return [f"measured by two steps: {memory}; the process had {resident_peak() / GB:.2f} GB of main memory at most"]
