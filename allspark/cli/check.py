"""allspark check: problems of a recipe, its data, its weights and its memory, found before a run starts."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from pathlib import Path

import torch

from allspark import recipe_arguments as recipe_args
from allspark.build import build_loader, build_method, check_schedule
from allspark.config import Recipe
from allspark.data.audit import AuditReport, audit, select_hidden
from allspark.data.datasets import spec_for
from allspark.data.plausibility import doubts, few_steps
from allspark.data.spec import DatasetSpec
from allspark.data.splits import Lists, describe_lists, resolve
from allspark.device import choose_device
from allspark.engine.optim import scale_lr
from allspark.engine.stepper import micro_batch_size, set_precision
from allspark.evaluation.sliding_window import inference_for
from allspark.memory_estimate import GB, StepMemory, free_memory, measure_step, predict_step, resident_peak
from allspark.models.segmentor import build_model
from allspark.models.timm_encoder import TimmEncoder
from allspark.run import describe_batch, ohem_without_effect
from allspark.utils.errors import UserError, is_out_of_memory, printable, reason_of
from allspark.weights.loading import load_pretrained

REMEDIES = "micro_batch, a smaller crop_size, precision=bf16 or model.checkpointing=true needs less"
QUICK_FILES = 200  # of each list, with --quick
LOW_RATE = 3e-4  # of AdamW: half of the lowest that a recipe from random weights has
CHECKPOINTS = 4  # latest, previous, best, and the one being written


def main(args: argparse.Namespace) -> None:
    recipe = recipe_args.recipe_of(args)
    spec = spec_for(recipe.data)
    method = build_method(recipe, spec)
    if args.processes < 1 or recipe.batch_size % args.processes:
        raise UserError(f"--processes {args.processes}: give a number that divides batch_size={recipe.batch_size}")
    found = AuditReport(notes=[*recipe.notes])
    with found.collect_errors():
        check_schedule(recipe, method)
    with found.collect_errors():
        lists = resolve(recipe.data, problems=found.problems)
        found.extend(data_findings(recipe, spec, lists, args.quick))
        if not found.problems or recipe.data.cache == "none":  # building a cache would report the same problems
            loader = build_loader(recipe, lists, spec, method.views)
            found.notes += batch_notes(recipe, recipe_without_overrides(args), loader.steps_per_epoch, args.processes)
            found.warnings += few_steps(
                lists, recipe.epoch_of, recipe.epochs, loader.steps_per_epoch, recipe.batch_size
            )
            found.notes += recipe_args.changes(args, recipe)
            found.warnings += filter(None, [ohem_without_effect(recipe, args.processes)])
    if args.data_only:
        return print_findings(found)
    with found.collect_errors():
        inference_for(spec, recipe.data.crop_size, recipe.evaluation)
        found.extend(model_findings(recipe, spec))
        memory, about_memory = memory_findings(recipe, spec, args.processes)
        found.extend(about_memory)
        found.extend(disk_findings(memory, args.save_path))
        if args.dry_run:
            found.notes += measure_memory(recipe, spec)
    print_findings(found)


def print_findings(found: AuditReport) -> None:
    """Print notes, warnings and problems, a line each. UserError if there are problems."""
    print(printable("\n".join(found.lines)))
    if not found.problems:
        print("no problems found")
        return
    first, *others = found.problems
    if not others:
        raise UserError(first)
    print(printable("\n".join(f"PROBLEM: {line}" for line in found.problems)))
    raise UserError(f"{len(found.problems)} problems, listed above; the first is: {first}")


def data_findings(recipe: Recipe, spec: DatasetSpec, lists: Lists, quick: bool) -> AuditReport:
    """Origin of the lists and content of their files."""
    found = audit(recipe.data, spec, lists, QUICK_FILES if quick else None)
    found.warnings += doubts(lists, spec)
    found.notes.append(describe_lists(lists))
    found.extend(select_hidden(lists, spec, recipe.evaluation.pseudo_labels)[1])
    return found


def recipe_without_overrides(args: argparse.Namespace) -> Recipe:
    """The recipe as it is in configs/ or in the file of --config."""
    plain = copy.copy(args)
    plain.overrides = []
    try:
        return recipe_args.recipe_of(plain)
    except UserError:  # the file is complete only with the overrides
        return recipe_args.recipe_of(args)


def batch_notes(recipe: Recipe, plain: Recipe, steps: int, processes: int) -> list[str]:
    """Batch size and learning rate, and advice if the batch size differs from the recipe's."""
    lr = scale_lr(recipe.optim, recipe.batch_size).lr
    notes = [
        f"a step has {describe_batch(recipe, processes)}; {steps} steps per epoch, "
        f"{steps * recipe.epochs} in {recipe.epochs} epochs; learning rate {lr:g}, times {recipe.optim.lr_multi:g} "
        "outside the encoder"
    ]
    if recipe.batch_size != plain.batch_size:
        linear = plain.optim.lr * recipe.batch_size / plain.batch_size
        notes.append(
            f"batch_size is {plain.batch_size} in the recipe and {recipe.batch_size} here, the learning rate "
            f"{plain.optim.lr:g} and {lr:g}; scaled with the batch (lr_scaling=linear) it would be {linear:g}. "
            "Results are most comparable with the recipe's own values; micro_batch splits a step to save memory"
        )
    return notes


def model_findings(recipe: Recipe, spec: DatasetSpec) -> AuditReport:
    """Whether the network can be built and its weights loaded."""
    found = AuditReport()
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels)
    with found.collect_errors():
        found.notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
    if recipe.model.pretrained == recipe.model.init_from == "none":
        remedy = "model.pretrained=FILE, see `python -m allspark weights fetch`"
        if isinstance(model.encoder, TimmEncoder):
            remedy = model.encoder.download_hint() or "model.pretrained=FILE"
        found.notes.append(f"weights: none, {recipe.model.encoder} starts from random initialization ({remedy})")
        lr = scale_lr(recipe.optim, recipe.batch_size).lr
        if recipe.optim.name == "adamw" and lr < LOW_RATE:
            found.warnings.append(
                f"the learning rate {lr:g} is low for random weights: training hardly progresses (the recipes of "
                "camvid and shapes have 6e-4 and 1e-3)"
            )
    return found


def memory_findings(recipe: Recipe, spec: DatasetSpec, processes: int) -> tuple[StepMemory, AuditReport]:
    """Predicted memory of a training step on the recipe's device (auto: a GPU if there is one), and whether it fits."""
    gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    kind = "cuda" if gpu else "cpu"
    memory = predict_step(recipe, spec, build_method(recipe, spec), kind, processes)
    share = f"{micro_batch_size(recipe, processes)} labeled images per forward pass, one of {processes} process(es)"
    context = "; the CUDA context and the allocator's gaps come on top" if gpu else ""
    found = AuditReport(notes=[f"memory of a training step on {kind}, {share}: predicted {memory}{context}"])
    free = free_memory(kind)
    if free is not None and memory.peak >= free:
        found.warnings.append(
            f"a training step needs more than the {free / GB:.2f} GB that are free on this {kind}; {REMEDIES}"
        )
    return memory, found


def disk_findings(memory: StepMemory, save_path: Path) -> AuditReport:
    """Whether the checkpoints fit on the disk; each has the tensors that persist from step to step."""
    place = Path(os.path.abspath(save_path))
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return AuditReport(problems=[f"--save-path {save_path}: {place} is not a folder; choose another --save-path"])
    needed, free = CHECKPOINTS * sum(memory.persistent.values()), shutil.disk_usage(place).free
    sizes = f"{CHECKPOINTS} checkpoints need up to {needed / GB:.2f} GB, {free / GB:.2f} GB are free"
    note = f"disk space at {save_path}: {sizes}"
    if needed > free:
        return AuditReport(problems=[f"{note}; free disk space or choose another --save-path"])
    return AuditReport(notes=[note])


def measure_memory(recipe: Recipe, spec: DatasetSpec) -> list[str]:
    device = choose_device(recipe.device)
    set_precision(recipe.precision, device)
    try:
        memory = measure_step(recipe, spec, build_method(recipe, spec), device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--dry-run: {reason_of(error)}; {REMEDIES}") from None
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return [f"measured in two steps: {memory}; torch's allocator reserved {reserved / GB:.2f} GB"]
    peak = resident_peak()
    resident = f"; peak resident memory of the process: {peak / GB:.2f} GB" if peak else ""
    return [f"measured in two steps: {memory}{resident}"]
