"""Train a semi-supervised semantic segmentation model."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before anything large is imported: handle signals, answer --help and wrong arguments
    from allspark.utils.environment import check_environment
    from allspark.utils.signals import exit_on_signals

    exit_on_signals()
    check_environment()
    from allspark.arguments import parse

    parse("train", sys.argv[1:])

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from allspark import distributed, launch
from allspark import recipe_arguments as recipe_args
from allspark.arguments import PROG, parse
from allspark.build import build_method, check_schedule
from allspark.config import Recipe
from allspark.config_io import to_plain
from allspark.data.datasets import spec_for
from allspark.data.worker_pool import worker_count
from allspark.engine.checkpoint import BEST, LATEST, has_checkpoint
from allspark.engine.optim import poly_lr
from allspark.engine.position import Position, is_finished
from allspark.engine.stepper import autocast, micro_batch_size
from allspark.engine.stop import Stop
from allspark.evaluation.evaluate import evaluate
from allspark.evaluation.metrics import EvalResult, format_table
from allspark.evaluation.pseudo_label_quality import PseudoLabelQuality, measure_pseudo_labels
from allspark.models.student import Student
from allspark.run import Run, build_run
from allspark.train_step import train_step
from allspark.utils.errors import run_main
from allspark.visualization.tensorboard_images import Snapshots


def train(
    recipe: Recipe,
    save_path: Path,
    device: torch.device,
    stop: Stop,
    *,
    fresh: bool = False,
    command: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Train a recipe from its first, or its last saved, step to the end.

    Args:
        recipe: with all defaults filled in.
        save_path: folder of the run.
        device: of this process.
        stop: receives signals.
        fresh: start over; an existing run is moved aside.
        command: command line that reproduces this config.
        notes: messages to log at start-up.
    """
    with contextlib.ExitStack() as stack:
        started = build_run(recipe, save_path, device, stop, stack, fresh=fresh, command=command, notes=notes)
        if started is None:
            return
        run, position = started
        stop.defer()  # from here on a signal waits for the end of the step
        while not is_finished(recipe, position):
            position = train_epoch(run, position)
            epoch, improved = position.epoch, False
            last = is_finished(recipe, position.next_epoch())
            if last or (epoch + 1) % recipe.evaluation.interval == 0:
                run.checkpointer.after_epoch(position)
                snapshots = Snapshots(run.spec.palette, pictures_after(epoch, recipe))
                with stop.immediately():  # everything is saved
                    scores, quality = validate(run, snapshots)
                position = position.with_score(scores.miou)
                improved = position.best["epoch"] == epoch
                last = is_finished(recipe, position.next_epoch())  # an improvement postpones early stopping
                log_evaluation(run, position, scores, quality, snapshots)
            position = position.next_epoch()
            run.checkpointer.after_epoch(position, improved, last)
        for line in describe_end(recipe, save_path, position, scores, run.spec.classes):
            run.log.info(line)


def train_epoch(run: Run, position: Position) -> Position:
    """Train to the end of the epoch; returns the position after its last step."""
    first = position.epoch * run.loader.steps_per_epoch
    end = first + run.loader.steps_per_epoch
    run.network.train()
    run.loader.set_epoch(position.epoch, start_step=position.step - first)
    run.stepper.save_buffers()
    for labeled, unlabeled in (
        run.log.exclude_startup(run.loader.on(run.device, run.log.info)) if position.step < end else ()
    ):
        lr = poly_lr(run.optim, position.step, run.total_steps)
        losses = train_step(run, labeled, unlabeled, position, lr)
        position = position.next_step()
        run.log.add(losses, step=position.step, epoch=position.epoch, lr=lr, images=run.recipe.batch_size)
        if position.step < end:  # the end of an epoch is saved by train
            run.checkpointer.after_step(position)
    run.log.flush()
    for module in (run.model, run.method):  # a teacher has batch norm statistics, too
        distributed.share_batchnorm_statistics(module)
    return position


def validate(run: Run, snapshots: Snapshots) -> tuple[EvalResult, PseudoLabelQuality | None]:
    """Scores on val, and the quality of the pseudo-labels on unlabeled images, in the run's precision.

    Args:
        run: the run.
        snapshots: collects pictures for TensorBoard.

    Returns:
        EvalResult, and the quality, None if no unlabeled image has a known label.
    """
    recipe = run.recipe
    if run.graphs is not None:
        run.graphs.make_room()
    # Evaluation images vary in size: run eagerly instead of recompiling
    stance = torch.compiler.set_stance("force_eager") if recipe.compile else contextlib.nullcontext()
    with autocast(recipe.precision, run.device), stance:
        scores = evaluate(
            run.method.predictor(run.model),
            run.val,
            run.spec,
            run.device,
            run.inference,
            num_workers=worker_count(recipe.data.num_workers),
            timeout=recipe.data.timeout,
            progress=True,
            save=snapshots.prediction if snapshots.count else None,
        )
        return scores, pseudo_label_quality(run, snapshots) if recipe.evaluation.pseudo_labels else None


def pseudo_label_quality(run: Run, snapshots: Snapshots) -> PseudoLabelQuality | None:
    """Quality of the method's pseudo-labels on unlabeled images; None if none of them has a known label."""

    def labeler(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        pseudo = run.method.pseudo_labels(Student(run.model), image, valid)
        return pseudo.label, pseudo.confidence

    return measure_pseudo_labels(
        labeler,
        run.crops,
        run.device,
        threshold=run.method.thresholds(),
        batch_size=micro_batch_size(run.recipe, distributed.world_size()),  # as large as in training
        num_workers=worker_count(run.recipe.data.num_workers),
        timeout=run.recipe.data.timeout,
        show=snapshots.pseudo_label if snapshots.count else None,
    )


def log_evaluation(
    run: Run, position: Position, scores: EvalResult, quality: PseudoLabelQuality | None, snapshots: Snapshots
) -> None:
    memory = None
    if run.model.bottleneck is not None:  # share of each class's slots that was written, in percent
        fill = run.model.bottleneck.memory.fill().tolist()
        memory = {name: round(value, 1) for name, value in zip(run.spec.classes, fill, strict=True)}
    run.log.evaluation(
        step=position.step,
        epoch=position.epoch,
        miou=scores.miou,
        iou=scores.by_class(run.spec.classes),
        memory=memory,
        pictures=snapshots.strips,
        **(quality.metrics() if quality else {}),
    )
    best, more = position.best, f", {quality}" if quality else ""
    best_text = f"best {best['miou']:.2f} in epoch {best['epoch'] + 1}"
    run.log.info(f"epoch {position.epoch + 1}: mIoU {scores.miou:.2f} ({best_text}){more}")


def describe_end(
    recipe: Recipe, save_path: Path, position: Position, scores: EvalResult, classes: Sequence[str]
) -> list[str]:
    """Scores of the finished run, where it is, and what to do with it."""
    best, folder = position.best, shlex.quote(str(save_path))
    early = "" if position.epoch == recipe.epochs else f" of {recipe.epochs}, by early stopping"
    return [
        format_table(scores, classes),
        f"last epoch ({position.epoch}{early}) {scores.miou:.2f}, best {best['miou']:.2f} in epoch {best['epoch'] + 1} "
        f"(selected on val)",
        f"{save_path}: {LATEST} is the last epoch, {BEST} the best one",
        "next (eval and predict use the last epoch, with --best the best one):",
        f"  {PROG} eval --checkpoint {folder}",
        f"  {PROG} predict --checkpoint {folder} --out predictions IMAGES",
        f"  {PROG} report {folder} --out report.html",
    ]


def pictures_after(epoch: int, recipe: Recipe) -> int:
    """Number of pictures to log: they are large, so only after the last epoch and about twenty evaluations before."""
    evaluations = recipe.epochs // recipe.evaluation.interval
    due = (epoch + 1) // recipe.evaluation.interval % max(evaluations // 20, 1) == 0
    return recipe.evaluation.pictures if due or epoch + 1 == recipe.epochs else 0


def default_path(recipe: Recipe, method: str) -> Path:
    """exp/<dataset>/<method>/<split>; whatever a recipe names them, the path stays inside exp."""
    names = (recipe.data.dataset, method, recipe.data.split or "own")
    return Path("exp", *(name.replace("/", "_").replace("\\", "_").replace("..", "_") for name in names))


def main(argv: Sequence[str]) -> None:
    args = parse("train", argv)
    recipe = recipe_args.recipe_of(args)
    if args.print_config:
        print(yaml.safe_dump(to_plain(recipe), sort_keys=False), end="")
        return
    save_path = args.save_path or default_path(recipe, args.method or recipe.method.name)
    if args.fresh or not has_checkpoint(save_path):  # an older run may finish
        check_schedule(recipe, build_method(recipe, spec_for(recipe.data)))
    with Stop() as stop, launch.process_group(recipe.device, args.port) as device:
        notes = [*recipe.notes, *recipe_args.changes(args, recipe)]
        command = recipe_args.command(args)
        fresh = args.fresh and not launch.is_restart(device)
        if args.fresh and not fresh:
            notes.append("--fresh ignored: the job was restarted by slurm or torchrun, resuming")
        train(recipe, save_path, device, stop, fresh=fresh, command=command, notes=notes)


if __name__ == "__main__":
    sys.exit(run_main(main))
