"""A run: everything that training one recipe needs, built from scratch or resumed from a checkpoint."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from allspark import distributed, launch
from allspark.build import build_loader, build_method
from allspark.checkpointer import Checkpointer, resume
from allspark.config import OptimConfig, Recipe, height_width
from allspark.config_io import to_plain
from allspark.cuda_graph import build_graphs, why_eager
from allspark.data.audit import preflight, select_hidden
from allspark.data.datasets import spec_for
from allspark.data.loaders import TrainLoader
from allspark.data.spec import DatasetSpec
from allspark.data.splits import Lists, describe_lists, resolve
from allspark.engine.checkpoint import LATEST, has_checkpoint
from allspark.engine.log import TEXT, RunLog
from allspark.engine.optim import build_optimizer, scale_lr
from allspark.engine.position import Position, is_finished
from allspark.engine.provenance import PROVENANCE, read_provenance, revision, write_provenance
from allspark.engine.run_lock import LOCK, RunLock
from allspark.engine.stepper import Stepper, has_bf16, micro_batch_size, set_deterministic, set_precision
from allspark.engine.stop import Stop
from allspark.engine.writers import METRICS, read_metrics
from allspark.evaluation.dataset import SegmentationDataset
from allspark.evaluation.sliding_window import Inference, inference_for
from allspark.models.segmentor import Segmentor, build_model
from allspark.models.sync_batch_norm import SyncBatchNorm
from allspark.train_step import TrainState
from allspark.utils.atomic import durable_write_text
from allspark.utils.errors import UserError, abbreviate
from allspark.weights.loading import load_pretrained

CONFIG = "config.yaml"  # the complete recipe of a run


@dataclass(frozen=True)
class Run(TrainState):
    """References to the parts of a run.

    Args:
        optim: optimizer config with the learning rate scaled to the batch size.
        spec: data set.
        loader: training batches of this process.
        val: images that the model is evaluated on.
        crops: unlabeled images with known labels, to measure the quality of pseudo-labels.
        inference: how val images are predicted.
        log: metrics and messages.
        checkpointer: writes checkpoints.
    """

    optim: OptimConfig
    spec: DatasetSpec
    loader: TrainLoader
    val: SegmentationDataset
    crops: SegmentationDataset
    inference: Inference
    log: RunLog
    checkpointer: Checkpointer


def build_run(
    recipe: Recipe,
    save_path: Path,
    device: torch.device,
    stop: Stop,
    stack: contextlib.ExitStack,
    *,
    fresh: bool = False,
    command: str = "",
    notes: Sequence[str] = (),
) -> tuple[Run, Position] | None:
    """Check the data, build model, method, optimizer and loader, and resume the run of save_path if there is one.

    Args:
        recipe: complete.
        save_path: folder of the run; it is locked until the stack is closed.
        device: of this process.
        stop: receives signals.
        stack: closes lock and log.
        fresh: move an existing run aside and start over.
        command: command line that reproduces this config.
        notes: messages to log at start-up.

    Returns:
        The run and its position, or None if the run of save_path is already finished.
    """
    set_precision(recipe.precision, device)
    set_deterministic(recipe.deterministic)
    spec = spec_for(recipe.data)
    lists = resolve(recipe.data)
    check_same_start(recipe, lists)
    optim = scale_lr(recipe.optim, recipe.batch_size)
    micro_batch_size(recipe, distributed.world_size())  # refuses one that does not fit, before a file is touched
    method = build_method(recipe, spec).to(device)
    data_notes = [describe_lists(lists), *preflight(recipe.data, spec, lists)]
    measured = recipe.evaluation.pseudo_labels if method.views.unlabeled else 0
    hidden, about_hidden = select_hidden(lists, spec, measured)
    data_notes += about_hidden.lines
    # Fine-tuning: with the same seed, new layers would get the initial weights of the original run
    torch.manual_seed(recipe.seed if recipe.model.init_from == "none" else recipe.seed + 2**31)
    model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels).to(device)
    if fresh or not has_checkpoint(save_path):
        data_notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
    method.attach(model)
    stepper = Stepper(model, build_optimizer(optim, model), recipe.precision, optim.clip_norm)
    loader = build_loader(recipe, lists, spec, method.views)
    inference = inference_for(spec, recipe.data.crop_size, recipe.evaluation)

    # --fresh moves a run aside: only after every check of the recipe
    lock = stack.enter_context(RunLock(save_path, active=distributed.is_main()))
    if distributed.is_main():
        notes = [*notes, *prepare_folder(lock, fresh)]
    distributed.barrier()
    state = TrainState(recipe, model, method, stepper, recipe.epochs * loader.steps_per_epoch, graphs=None)
    position, unlogged, resume_notes = resume(save_path, state, loader)
    if is_finished(recipe, position):
        if distributed.is_main():
            print(
                f"{save_path}: this run is finished, best mIoU {position.best['miou']:.2f}; use --fresh to start over"
            )
        return None
    state = replace(state, network=wrap_ddp(model, device), graphs=build_graphs(recipe, method, stepper))
    if recipe.compile:
        # DDP's graph splitting fails on custom autograd functions in older torch; parts are compiled one by one
        torch._dynamo.config.optimize_ddp = False
        for network in state.networks:
            network.compile_parts()
    if distributed.is_main():
        write_provenance(save_path, command, lists.split, device, resumed=position.step > 0)  # first: it marks a run
        durable_write_text(save_path / CONFIG, yaml.safe_dump(to_plain(recipe), sort_keys=False))
    log = stack.enter_context(open_log(save_path, state, position))
    log.load_state_dict(unlogged, device)
    for note in (f"run folder: {save_path}", *describe_run(state, position), *notes, *resume_notes, *data_notes):
        log.info(note)
    run = Run(
        **vars(state),
        optim=optim,
        spec=spec,
        loader=loader,
        val=SegmentationDataset(lists.val, spec),
        crops=SegmentationDataset(hidden, spec, recipe.data.crop_size),
        inference=inference,
        log=log,
        checkpointer=Checkpointer(save_path, state, loader, log, stop),
    )
    return run, position


def check_same_start(recipe: Recipe, lists: Lists) -> None:
    """Fail early if ranks disagree on code, config or file lists; a mismatch would deadlock the first collective."""
    same = replace(recipe, device="auto", data=replace(recipe.data, data_root="", num_workers=None, cache="none"))
    launch.check_ranks_agree(code=launch.code_version(), recipe=repr(same), lists=lists.hash)


def prepare_folder(lock: RunLock, fresh: bool) -> list[str]:
    """Refuse a folder in which this run would overwrite files that it did not write.

    Args:
        lock: of the folder.
        fresh: rename the folder of an existing run, and start in a new one.

    Returns:
        Notes for the log.

    Raises:
        UserError: a new run would replace the results of a run without checkpoints, or files of somebody else.
    """
    folder = lock.folder
    if fresh and (has_checkpoint(folder) or any((folder / name).exists() for name in (METRICS, PROVENANCE))):
        if not folder.name:
            raise UserError("--fresh cannot rename the current folder; run the command from another one, with its name")
        target = folder.with_name(f"{folder.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        lock.move_aside(target)
        return [f"{folder} was moved to {target}"]
    if has_checkpoint(folder):
        return []
    files = sorted(path for path in folder.iterdir() if path.name != LOCK and path.is_file() and path.stat().st_size)
    if not read_provenance(folder):
        for path in files:
            if path.name in (CONFIG, METRICS, TEXT):
                raise UserError(
                    f"{path}: training would overwrite this file, which does not belong to a run; move it, or choose "
                    f"another --save-path"
                )
        return [f"WARNING: {folder} has other files, too: {abbreviate([path.name for path in files])}"] if files else []
    if (folder / METRICS).is_file() and any("miou" in line for line in read_metrics(folder / METRICS)):
        raise UserError(
            f"{folder}: has the results of a run, but no checkpoint to continue it from; restore {LATEST}, choose "
            f"another --save-path, or use --fresh to move the folder aside"
        )
    return []


def open_log(save_path: Path, state: TrainState, position: Position) -> RunLog:
    recipe = state.recipe
    return RunLog(
        save_path,
        active=distributed.is_main(),
        interval=recipe.log.interval,
        start_step=position.step,
        start_epoch=position.epoch,
        total_steps=state.total_steps,
        stepper=state.stepper,
        writers=recipe.log.writers,
        config=to_plain(recipe),
    )


def wrap_ddp(model: Segmentor, device: torch.device) -> nn.Module:
    """DistributedDataParallel if there are several processes, with SyncBatchNorm on GPUs."""
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda":
        model = SyncBatchNorm.convert(model)
    device_ids = [device] if device.type == "cuda" else None
    # Depthwise weights (C, 1, 3, 3) get channels-last gradients: a copy of a few kB
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # No broadcast: the memory has its own policy, batch norm is shared at the end of an epoch, and all processes start
    # equal, because each builds the model from the same seed
    with warnings.catch_warnings():  # newer torch renames the argument, older torch only knows this name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def describe_run(state: TrainState, position: Position) -> list[str]:
    """A few lines about the run that is about to start."""
    recipe, model, method, device = state.recipe, state.model, state.method, state.device
    world_size = distributed.world_size()
    micro_batch = micro_batch_size(recipe, world_size)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    job = f", slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    lines = [
        f"{recipe.method.name} on {recipe.data.dataset}, {recipe.model.encoder} ({parameters:.2f} M parameters), "
        f"bottleneck {recipe.model.bottleneck.name}, seed {recipe.seed}",
        f"{world_size} process(es) on {device.type}, torch {torch.__version__}, {platform.machine()}, "
        f"revision {revision()}",
        f"host {platform.node()}, process id {os.getpid()}{job}",
        f"{recipe.epochs} epochs, {state.total_steps} steps of {describe_batch(recipe, world_size)}",
    ]
    if micro_batch * world_size < recipe.batch_size:
        lines.append("gradient accumulation: batch norm, OHEM, CutMix and the memory see one micro-batch at a time")
    if (method.views.cutmix or method.uses_cutmix_partner) and micro_batch == 1:
        lines.append("micro-batches of one image: CutMix has no other image to paste from and is off")
    if warning := ohem_without_effect(recipe, world_size):
        lines.append(f"WARNING: {warning}")
    if recipe.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        lines.append("WARNING: precision=bf16 on a CPU without bf16 instructions is many times slower than fp32")
    if device.type == "cuda":
        reason = why_eager(recipe, method, device)
        lines.append(f"steps are launched eagerly: {reason}" if reason else "steps are replayed as CUDA graphs")
    if position.step:
        between_epochs = position.step * recipe.epochs == position.epoch * state.total_steps
        where = f"after epoch {position.epoch}" if between_epochs else f"in epoch {position.epoch + 1}"
        lines.append(f"resumed {where} (step {position.step})")
        if position.world_size not in (None, world_size):
            lines.append(f"world size changed from {position.world_size} to {world_size}")
    return lines


def ohem_without_effect(recipe: Recipe, world_size: int) -> str | None:
    """A warning if criterion=ohem keeps every pixel of a forward pass."""
    criterion, images = recipe.criterion, micro_batch_size(recipe, world_size)
    pixels = images * math.prod(height_width(recipe.data.crop_size))
    kept = criterion.min_kept * (images / (criterion.min_kept_images or images))
    if criterion.name != "ohem" or kept < pixels:
        return None
    smaller = pixels // 16 * (criterion.min_kept_images or images) // images
    return (
        f"criterion=ohem has no effect: criterion.min_kept={criterion.min_kept} keeps all {pixels} pixels of a forward "
        f"pass; set a smaller number, such as criterion.min_kept={smaller}"
    )


def describe_batch(recipe: Recipe, world_size: int) -> str:
    """For example: 8 labeled images (2 processes x 2 micro-batches x 2 images)."""
    size, share = micro_batch_size(recipe, world_size), recipe.batch_size // world_size
    factors = [f"{world_size} processes"] * (world_size > 1) + [f"{share // size} micro-batches"] * (share > size)
    inside = f" ({' x '.join((*factors, f'{size} images'))})" if factors else ""
    return f"{recipe.batch_size} labeled images{inside}"
