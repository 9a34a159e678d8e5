"""Train one method on one split: the loop itself, read downward from `train`; --help shows the words."""

from __future__ import annotations

import sys

from allspark.arguments import parse

if __name__ == "__main__":
    parse("train", sys.argv[1:])  # answer --help and wrong arguments before torch is imported

import contextlib
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from allspark import distributed
from allspark.cli import recipe as recipe_words
from allspark.config import Recipe
from allspark.config_io import build_recipe, differences, to_plain
from allspark.data import spec_for
from allspark.data.base import DatasetSpec, SegmentationDataset, worker_count
from allspark.data.batch import passes
from allspark.data.preflight import check_data, hidden_sample
from allspark.data.splits import Lists, provenance, resolve
from allspark.engine.checkpoint import (
    LATEST,
    PREVIOUS,
    TO_RESUME,
    Position,
    buffers_by_rank,
    choice_of_first,
    find_checkpoint,
    fitting,
    load_checkpoint,
    load_own_buffers,
    load_state,
)
from allspark.engine.checkpointer import Keeper
from allspark.engine.files import Hold, write_text
from allspark.engine.log import RunLog
from allspark.engine.optim import build_optimizer, poly_lr, scale_lr, set_lr
from allspark.engine.provenance import revision, write_facts
from allspark.engine.signals import Stop
from allspark.engine.stepper import (
    Stepper,
    accumulating,
    autocast,
    has_bf16,
    mean_losses,
    pass_size,
    set_deterministic,
    set_precision,
)
from allspark.engine.writers import METRICS
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.metrics import Scores
from allspark.evaluation.pseudo_label_quality import CenterCrops, LabelQuality, label_quality
from allspark.evaluation.sliding_window import Inference, inference_for
from allspark.methods import Method, Progress
from allspark.models.segmentor import Segmentor, build_model
from allspark.utils.errors import UserError, run_main
from allspark.visualization.tensorboard_images import Snapshots
from allspark.weights.loading import load_pretrained


def train(
    recipe: Recipe,
    save_path: Path,
    device: torch.device,
    stop: Stop,
    *,
    fresh: bool = False,
    command: str = "",
    told: Sequence[str] = (),
) -> None:
    """A run from its first check to its last checkpoint. Long, because it is what happens, in order.

    command: the words that mean the recipe. told: what there is to say of it at the start.
    """
    set_precision(recipe.precision, device)
    set_deterministic(recipe.deterministic)
    spec = spec_for(recipe.data)
    lists = resolve(recipe.data)
    check_processes(recipe, lists)
    optim = scale_lr(recipe.optim, recipe.batch_size)
    at_once = pass_size(recipe, distributed.world_size())
    notes = [*provenance(lists, spec), *check_data(recipe.data, spec, lists)]
    hidden, hidden_notes = hidden_sample(lists, spec, recipe.evaluation.pseudo_labels)
    notes += hidden_notes

    with contextlib.ExitStack() as held:
        folder = held.enter_context(Hold(save_path, active=distributed.is_main()))
        torch.manual_seed(recipe.seed)
        model = build_model(recipe.model, spec.num_classes, recipe.data.crop_size).to(device)
        if fresh or not is_begun(save_path):
            notes += load_pretrained(model, recipe.model.pretrained, recipe.model.init_from)
        method = recipe_words.build_method(recipe, spec).to(device)
        method.attach(model)
        stepper = Stepper(model, build_optimizer(optim, model), recipe.precision, optim.clip_norm)
        loaders = recipe_words.build_loader(recipe, lists, spec, method.views)
        val, crops = SegmentationDataset(lists.val, spec), CenterCrops(hidden, spec, recipe.data.crop_size)
        inference = inference_for(spec, recipe.data.crop_size, recipe.evaluation.mode, recipe.evaluation.window)

        if fresh:
            move_aside(folder)
        start, kept, resume_notes = resume(save_path, recipe, lists, model, method, stepper)
        if start.epoch == recipe.epochs:
            if distributed.is_main():
                print(
                    f"{save_path}: this run is finished, best mIoU {start.best['miou']:.2f}; --fresh would start over"
                )
            return
        network = wrap(model, device)
        if recipe.compile:
            model.compile_parts()
        total_steps = recipe.epochs * loaders.steps_per_epoch
        if distributed.is_main():
            write_text(save_path / "config.yaml", yaml.safe_dump(to_plain(recipe), sort_keys=False))
            write_facts(save_path, command, lists.split, device, resumed=start.step > 0)
        log = held.enter_context(open_log(save_path, recipe, start, total_steps, stepper))
        log.load_state_dict(kept, device)
        for note in (*describe(recipe, model, method, device, total_steps, start), *told, *resume_notes, *notes):
            log.info(note)
        keeper = Keeper(
            save_path,
            model,
            log,
            stop,
            content=partial(checkpoint_content, recipe, lists, model, method, stepper, log),
            images=lambda reached: loaders.images((reached.step - 1) % loaders.steps_per_epoch),
            interval=recipe.checkpoint_interval,
            minutes=recipe.checkpoint_minutes,
            max_skipped=recipe.optim.max_skipped,
        )

        stop.defer()  # from here on a signal waits for the end of a step
        step, best = start.step, start.best
        for epoch in range(start.epoch, recipe.epochs):
            network.train()
            first, end = epoch * loaders.steps_per_epoch, (epoch + 1) * loaders.steps_per_epoch
            loaders.set_epoch(epoch, start_step=step - first)
            stepper.keep()
            for labeled, unlabeled in loaders.on(device, tell=log.info) if step < end else ():
                progress = Progress(step, epoch, total_steps)
                seed_step(recipe.seed, step)
                lr = poly_lr(optim, step, total_steps)
                set_lr(stepper.optimizer, lr)
                parts, done = passes(labeled, unlabeled, at_once), []
                for x, u in parts:  # one, unless gradients are accumulated
                    with accumulating(network, last=len(done) + 1 == len(parts)):
                        with autocast(recipe.precision, device):
                            if epoch < recipe.burn_in_epochs:
                                losses = method.supervised_losses(network, x)
                            else:
                                losses = method.losses(network, x, u, progress)
                        stepper.backward(losses["loss"] / len(parts))
                    done.append(losses)
                stepper.step()
                method.after_step(network, progress)
                step += 1
                log.add(mean_losses(done), step=step, epoch=epoch, lr=lr, images=recipe.batch_size)
                if step < end:  # the end of an epoch has its own
                    keeper.after_step(Position(epoch, step, best))
            log.flush()
            for network_state in (model, method):  # a teacher has statistics, too
                distributed.share_batchnorm_statistics(network_state)

            last = epoch + 1 == recipe.epochs
            improved = False
            if last or (epoch + 1) % recipe.evaluation.interval == 0:
                keeper.after_epoch(Position(epoch, step, best))
                with stop.at_once():  # all is saved
                    shown = Snapshots(spec.palette, pictures_after(epoch, recipe))
                    scores, quality = validate(recipe, inference, method, network, val, crops, device, shown)
                improved = scores.miou > best["miou"]
                best = {"miou": scores.miou, "epoch": epoch} if improved else best
                pseudo, told = (quality.named(), f", {quality}") if quality else ({}, "")
                log.evaluation(
                    step=step,
                    epoch=epoch,
                    miou=scores.miou,
                    iou=scores.by_class(spec.classes),
                    memory=memory_fill(model, spec),
                    pictures=shown.strips,
                    **pseudo,
                )
                log.info(
                    f"epoch {epoch}: mIoU {scores.miou:.2f} (best {best['miou']:.2f} in epoch {best['epoch']}){told}"
                )
            keeper.after_epoch(Position(epoch + 1, step, best), improved, last)
        log.info(f"last epoch {scores.miou:.2f}, best {best['miou']:.2f} in epoch {best['epoch']} (selected on val)")


def check_processes(recipe: Recipe, lists: Lists) -> None:
    """All began with the same, but for where a node has it; else they would wait for each other in vain."""
    same = replace(recipe, device="auto", data=replace(recipe.data, data_root="", num_workers=None, cache="none"))
    distributed.check_same(code=distributed.code_version(), recipe=repr(same), lists=lists.hash)


def is_begun(save_path: Path) -> bool:
    return any((save_path / name).exists() for name in (LATEST, PREVIOUS))


def resume(
    save_path: Path, recipe: Recipe, lists: Lists, model: Segmentor, method: Method, stepper: Stepper
) -> tuple[Position, list[dict[str, Tensor]], list[str]]:
    """Continue from the last checkpoint in save_path that can be read, if it belongs to the same recipe and lists.

    -> where it stands, the losses that are to be logged yet, and what there is to say.
    """
    found = find_checkpoint(save_path) if distributed.is_main() else None
    name = choice_of_first(found and found[0].name, stepper.device)
    if name is None:
        return Position(), [], []
    path = save_path / name
    content, notes = found[1:] if found else (load_checkpoint(path, TO_RESUME), [])
    distributed.check_same(checkpoint=f"{content['epoch']} {content['step']}")  # a file server may show an old file
    before = recipe_words.complete(build_recipe(content["recipe"], None, str(path)))  # keys younger than the run
    if changed := differences(to_plain(before), to_plain(recipe)):
        raise UserError(
            f"{save_path}: holds a run with another recipe ({'; '.join(changed[:5])}); "
            f"choose another --save-path, or --fresh to move the old run aside"
        )
    if content["split"]["sha256"] != lists.hash:
        raise UserError(
            f"{path}: this run began with other images in its lists (split {content['split']['name']}); "
            f"restore them, or --fresh to move the old run aside"
        )
    load_state(model, content["model"], path)
    load_state(method, content["method"], path)
    with fitting(path):
        load_own_buffers({"model": model, "method": method}, content.get("ranks", {}))
        stepper.load_state_dict(content)
    if name != LATEST and distributed.is_main() and (save_path / LATEST).exists():
        (save_path / LATEST).rename(save_path / "damaged.pth")  # else it would become previous.pth, which is whole
    position = Position(content["epoch"], content["step"], content["best"], content.get("world_size"))
    return position, content.get("log", []), notes


def pictures_after(epoch: int, recipe: Recipe) -> int:
    """How many are shown: they are large, so after the last epoch and at about twenty evaluations before it."""
    evaluations = recipe.epochs // recipe.evaluation.interval
    shown = (epoch + 1) // recipe.evaluation.interval % max(evaluations // 20, 1) == 0
    return recipe.evaluation.pictures if shown or epoch + 1 == recipe.epochs else 0


def validate(
    recipe: Recipe,
    inference: Inference,
    method: Method,
    network: nn.Module,
    val: SegmentationDataset,
    crops: CenterCrops,
    device: torch.device,
    shown: Snapshots,
) -> tuple[Scores, LabelQuality | None]:
    """What the result so far is worth on val, and the pseudo-labels on unlabeled images; in the run's precision."""
    predictor, data = method.predictor(network), recipe.data
    loading = dict(num_workers=worker_count(data.num_workers), timeout=data.timeout)
    save = shown.prediction if shown.count else None
    with autocast(recipe.precision, device), not_compiled(recipe):
        scores = evaluate(predictor, val, val.spec, device, inference, progress=True, save=save, **loading)
        return scores, measure_labels(recipe, method, network, crops, device, shown)


def not_compiled(recipe: Recipe) -> contextlib.AbstractContextManager:
    """Images to evaluate have any size: nothing is compiled for them."""
    return torch.compiler.set_stance("force_eager") if recipe.compile else contextlib.nullcontext()


def measure_labels(
    recipe: Recipe, method: Method, network: nn.Module, crops: CenterCrops, device: torch.device, shown: Snapshots
) -> LabelQuality | None:
    """What the method's pseudo-labels are worth on these crops of unlabeled images; None where nothing is known."""
    if not recipe.evaluation.pseudo_labels:
        return None

    def labeler(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        pseudo = method.pseudo_labels(network, image, valid)
        return pseudo.label, pseudo.confidence

    return label_quality(
        labeler,
        crops,
        device,
        threshold=method.thresholds(),
        batch_size=pass_size(recipe, distributed.world_size()),  # a pass as large as training's own
        num_workers=worker_count(recipe.data.num_workers),
        timeout=recipe.data.timeout,
        show=shown.pseudo_label if shown.count else None,
    )


def memory_fill(model: Segmentor, spec: DatasetSpec) -> dict[str, float] | None:
    """How much of each class's slots was ever written, in percent; None without a memory."""
    if model.bottleneck is None:
        return None
    memory = model.bottleneck.memory
    filled = (100 * memory.filled / memory.queue.shape[1]).tolist()
    return {name: round(value, 1) for name, value in zip(spec.classes, filled, strict=True)}


def checkpoint_content(
    recipe: Recipe, lists: Lists, model: Segmentor, method: Method, stepper: Stepper, log: RunLog, reached: Position
) -> dict[str, Any]:
    """All that a run is, but for what it reads. Made by all processes together: some buffers are each one's own."""
    one_memory = recipe.model.bottleneck.memory_policy != "local"
    return {
        "model": model.state_dict(),
        "method": method.state_dict(),
        "ranks": buffers_by_rank({"model": model, "method": method}, ("model.bottleneck.memory.",) * one_memory),
        **stepper.state_dict(),
        "log": log.state_dict(),
        "epoch": reached.epoch,
        "step": reached.step,
        "best": reached.best,
        "recipe": to_plain(recipe),
        "split": lists.split,
        "world_size": distributed.world_size(),
    }


def wrap(model: Segmentor, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes, with SyncBatchNorm where it can work: on GPUs."""
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    devices = [device] if device.type == "cuda" else None
    # Depthwise weights (C, 1, 3, 3) get channels-last gradients: a copy of a few kB, nothing to tell a user
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Buffers are nobody's to overwrite: the memory states its own policy, batch norm is shared at the end of an epoch,
    # and all start alike because every process built the model from the same seed.
    with warnings.catch_warnings():  # newer torch renames the argument, older torch knows only this name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def seed_step(seed: int, step: int) -> None:
    """Dropout and drop path are a function of (seed, step, rank): a resumed run needs no state of a generator."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + distributed.rank())


def open_log(save_path: Path, recipe: Recipe, start: Position, total_steps: int, stepper: Stepper) -> RunLog:
    return RunLog(
        save_path,
        active=distributed.is_main(),
        interval=recipe.log.interval,
        start_step=start.step,
        start_epoch=start.epoch,
        total_steps=total_steps,
        stepper=stepper,
        writers=recipe.log.writers,
        config=to_plain(recipe),
    )


def describe(
    recipe: Recipe, model: Segmentor, method: Method, device: torch.device, total_steps: int, start: Position
) -> list[str]:
    """What is about to run, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    job = f", slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    batch = recipe_words.batch_in_words(recipe, distributed.world_size())
    lines = [
        f"{recipe.method.name} on {recipe.data.dataset}, {recipe.model.encoder} ({parameters:.2f} M parameters), "
        f"bottleneck {recipe.model.bottleneck.name}, seed {recipe.seed}",
        f"{distributed.world_size()} process(es) on {device.type}, torch {torch.__version__}, {platform.machine()}, "
        f"revision {revision()}",
        f"on {platform.node()}, process {os.getpid()}{job}",
        f"{recipe.epochs} epochs, {total_steps} steps of {batch}",
    ]
    at_once, processes = pass_size(recipe, distributed.world_size()), distributed.world_size()
    if at_once * processes < recipe.batch_size:
        lines.append("gradients add up over passes; batch norm, OHEM, CutMix and the memory see one pass at a time")
    if (method.views.cutmix or method.mixes) and at_once == 1:
        lines.append("one image in a pass: CutMix has no other image to paste from and is off")
    if recipe.precision == "bf16" and device.type == "cpu" and not has_bf16(device):
        lines.append("WARNING: precision=bf16 on a CPU without bf16 instructions is many times slower than fp32")
    if start.step:
        between = start.step * recipe.epochs == start.epoch * total_steps
        lines.append(
            f"resumed {f'behind epoch {start.epoch - 1}' if between else f'in epoch {start.epoch}'}, step {start.step}"
        )
        if start.world_size != distributed.world_size():
            lines.append(f"went so far with {start.world_size} process(es), goes on with {distributed.world_size()}")
    return lines


def move_aside(folder: Hold) -> None:
    """--fresh: the old run keeps its files under another name. A folder that is no run is left where it is."""
    path = folder.folder
    if distributed.is_main() and (is_begun(path) or (path / METRICS).exists()):
        aside = path.with_name(f"{path.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        folder.move_aside(aside)
        print(f"{path} was moved to {aside}")
    distributed.barrier()


def default_path(recipe: Recipe, method: str) -> Path:
    """exp/<dataset>/<method>/<split>, whatever a recipe calls them: nothing leads out of exp."""
    names = (recipe.data.dataset, method, recipe.data.split or "own")
    return Path("exp", *(name.replace("/", "_").replace("\\", "_").replace("..", "_") for name in names))


def main(argv: Sequence[str]) -> None:
    args = parse("train", argv)
    recipe = recipe_words.recipe_of(args)
    recipe_words.build_method(recipe, spec_for(recipe.data))  # refused before a file is touched
    if args.print_config:
        print(yaml.safe_dump(to_plain(recipe), sort_keys=False), end="")
        return
    save_path = args.save_path or default_path(recipe, args.method or recipe.method.name)
    with Stop() as stop, distributed.process_group(recipe.device, args.port) as device:
        told, command = [*recipe.notes, *recipe_words.changes(args, recipe)], recipe_words.command(args)
        fresh = args.fresh and not distributed.is_restart()
        if fresh != args.fresh:
            told.append("--fresh is of a job's first start: started again by slurm or torchrun, it goes on")
        train(recipe, save_path, device, stop, fresh=fresh, command=command, told=told)


if __name__ == "__main__":
    sys.exit(run_main(main))
