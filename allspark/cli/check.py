"""python -m allspark check: all that can be wrong with a recipe and its data, told at once, before a run starts."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch

from allspark.cli import recipe as recipe_words
from allspark.config import Recipe
from allspark.data import spec_for
from allspark.data.base import DatasetSpec
from allspark.data.preflight import hidden_sample
from allspark.data.splits import Lists, provenance, resolve
from allspark.data.survey import Findings, survey
from allspark.distributed import choose_device
from allspark.engine.optim import scale_lr
from allspark.engine.stepper import pass_size, set_precision
from allspark.evaluation.sliding_window import inference_for
from allspark.memory_estimate import GB, StepMemory, measure_step, predict_step, resident_peak, room
from allspark.models.segmentor import build_model
from allspark.models.timm_encoder import TimmEncoder
from allspark.utils.errors import UserError
from allspark.weights.loading import load_pretrained

REMEDIES = "micro_batch, a smaller crop_size, precision=bf16 or model.checkpointing=true takes less"
QUICK = 200  # files of each list
CHECKPOINTS = 4  # latest, previous, best, and the one that is being written


def main(args: argparse.Namespace) -> None:
    recipe = recipe_words.recipe_of(args)
    spec = spec_for(recipe.data)
    method = recipe_words.build_method(recipe, spec)
    if args.processes < 1 or recipe.batch_size % args.processes:
        raise UserError(f"--processes {args.processes}: give a number that divides batch_size={recipe.batch_size}")
    found = Findings()
    with found.told():
        lists = resolve(recipe.data, problems=found.problems)
        found.add(data_findings(recipe, spec, lists, args.quick))
        if not found.problems or recipe.data.cache == "none":  # a cache would be built now, and find the same
            loader = recipe_words.build_loader(recipe, lists, spec, method.views)
            found.notes += batch_notes(recipe, published(args), loader.steps_per_epoch, args.processes)
            found.notes += recipe_words.changes(args, recipe)
    if args.data_only:
        return tell(found)
    with found.told():
        inference_for(spec, recipe.data.crop_size, recipe.evaluation.mode, recipe.evaluation.window)
        found.add(model_findings(recipe, spec))
        memory, kind = predicted(recipe, spec, args.processes)
        found.notes.append(told_memory(memory, kind, recipe, args.processes))
        found.warnings += too_little(memory, kind)
        found.add(disk_findings(memory, args.save_path))
        if args.dry_run:
            found.notes += measured(recipe, spec)
    tell(found)


def tell(found: Findings) -> None:
    """Notes, warnings and problems, a line each; UserError for problems: of a single one, that one."""
    print("\n".join((*found.notes, *(f"WARNING: {line}" for line in found.warnings))))
    if not found.problems:
        print("nothing that would stop this run was found")
        return
    first, *others = found.problems
    if not others:
        raise UserError(first)
    print("\n".join(f"PROBLEM: {line}" for line in found.problems))
    raise UserError(f"{len(found.problems)} problems, listed above; the first: {first}")


def data_findings(recipe: Recipe, spec: DatasetSpec, lists: Lists, quick: bool) -> Findings:
    """Whose the lists are, and what their files hold."""
    found = survey(recipe.data, spec, lists, QUICK if quick else None)
    for line in (*provenance(lists, spec), *hidden_sample(lists, spec, recipe.evaluation.pseudo_labels)[1]):
        warning = line.removeprefix("WARNING: ")
        (found.notes if warning == line else found.warnings).append(warning)
    return found


def published(args: argparse.Namespace) -> Recipe:
    """The recipe without the words behind it: as configs/ or the file of --config has it."""
    plain = copy.copy(args)
    plain.overrides = []
    try:
        return recipe_words.recipe_of(plain)
    except UserError:  # a file that is whole with these words alone
        return recipe_words.recipe_of(args)


def batch_notes(recipe: Recipe, plain: Recipe, steps: int, processes: int) -> list[str]:
    """The global batch, and where it is another than the recipe's what that means for the learning rate."""
    lr = scale_lr(recipe.optim, recipe.batch_size).lr
    notes = [
        f"a step takes {recipe_words.batch_in_words(recipe, processes)}; {steps} steps per epoch, "
        f"{steps * recipe.epochs} in {recipe.epochs} epochs; learning rate {lr:g}, times {recipe.optim.lr_multi:g} "
        "outside of the encoder"
    ]
    if recipe.batch_size != plain.batch_size:
        linear = plain.optim.lr * recipe.batch_size / plain.batch_size
        notes.append(
            f"batch_size is {plain.batch_size} in the recipe and {recipe.batch_size} here, the learning rate "
            f"{plain.optim.lr:g} and {lr:g}; in proportion to the batch (lr_scaling=linear) it is {linear:g}. Results "
            "compare best where both are the recipe's: micro_batch takes a step in parts, which need less memory"
        )
    return notes


def model_findings(recipe: Recipe, spec: DatasetSpec) -> Findings:
    """Whether the network can be built and its weights be loaded."""
    found = Findings()
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size)
    with found.told():
        found.notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
    if recipe.model.pretrained == recipe.model.init_from == "none":
        way = "model.pretrained=FILE, see `python -m allspark weights fetch`"
        if isinstance(model.encoder, TimmEncoder):
            way = model.encoder.way_to_weights() or "model.pretrained=FILE"
        found.notes.append(f"weights: none, {recipe.model.encoder} starts from random numbers ({way})")
    return found


def predicted(recipe: Recipe, spec: DatasetSpec, processes: int) -> tuple[StepMemory, str]:
    """The memory of a step on the device that the recipe names, and which that is; auto: a GPU where there is one."""
    gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    kind = "cuda" if gpu else "cpu"
    return predict_step(recipe, spec, recipe_words.build_method(recipe, spec), kind, processes), kind


def told_memory(memory: StepMemory, kind: str, recipe: Recipe, processes: int) -> str:
    share = f"{pass_size(recipe, processes)} labeled images at once, one of {processes} process(es)"
    context = "; the CUDA context and the allocator's gaps come on top" if kind == "cuda" else ""
    return f"memory of a training step on {kind}, {share}: predicted {memory}{context}"


def too_little(memory: StepMemory, kind: str) -> list[str]:
    free = room(kind)
    if free is None or memory.peak < free:
        return []
    return [f"a training step takes more than the {free / GB:.2f} GB that are free on this {kind}; {REMEDIES}"]


def disk_findings(memory: StepMemory, save_path: Path) -> Findings:
    """Room for the checkpoints, each of which holds what a process keeps from step to step."""
    place = Path(os.path.abspath(save_path))
    while not place.exists():
        place = place.parent
    needed, free = CHECKPOINTS * sum(memory.held.values()), shutil.disk_usage(place).free
    told = f"{save_path}: {CHECKPOINTS} checkpoints take up to {needed / GB:.2f} GB, {free / GB:.2f} GB are free"
    if needed > free:
        return Findings(problems=[f"{told}; make room, or choose another --save-path"])
    return Findings(notes=[f"disk of {told}"])


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
    peak = resident_peak()
    told = f"; the process had {peak / GB:.2f} GB of main memory at most" if peak else ""
    return [f"measured by two steps: {memory}{told}"]
