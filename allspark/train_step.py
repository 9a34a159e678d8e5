"""One training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allspark import distributed
from allspark.config import Recipe
from allspark.cuda_graph import GraphedUpdate
from allspark.data.batch import LabeledBatch, UnlabeledBatch, split_micro_batches
from allspark.engine.optim import set_lr
from allspark.engine.position import Position
from allspark.engine.stepper import AUTOCAST, Stepper, autocast, mean_losses, micro_batch_size, sync_gradients
from allspark.methods import Method, Progress
from allspark.models.cast_weights import cast_weights
from allspark.models.segmentor import Segmentor, unwrap
from allspark.models.student import Student


@dataclass(frozen=True)
class TrainState:
    """What a training step reads and updates.

    Args:
        recipe: the config.
        network: the Segmentor, or its DistributedDataParallel wrapper.
        method: attached to the model.
        stepper: of the model.
        total_steps: optimizer steps of the whole run.
        graphs: replays steps as CUDA graphs; None: every step is eager.
    """

    recipe: Recipe
    network: nn.Module
    method: Method
    stepper: Stepper
    total_steps: int
    graphs: GraphedUpdate | None

    @property
    def model(self) -> Segmentor:
        return unwrap(self.network)

    @property
    def networks(self) -> list[Segmentor]:
        """The model and the teachers of the method."""
        return [module for module in (self.model, *self.method.modules()) if isinstance(module, Segmentor)]

    @property
    def device(self) -> torch.device:
        return self.stepper.device


def train_step(
    state: TrainState, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, position: Position, lr: float
) -> dict[str, Tensor]:
    """One optimizer step; the training loop, the benchmark, the memory estimate and the tests call this function.

    Args:
        state: what is trained.
        labeled, unlabeled: this process's share of the batch, on the device. It is split into micro-batches whose
            gradients are accumulated.
        position: steps and epochs done before this step.
        lr: learning rate of the encoder.

    Returns:
        The losses, averaged over the micro-batches, as tensors on the device.
    """
    recipe = state.recipe
    progress = Progress(position.step, position.epoch, state.total_steps, recipe.burn_in_epochs)
    seed_step(recipe.seed, position.step)
    set_lr(state.stepper.optimizer, lr)
    burn_in = position.epoch < recipe.burn_in_epochs
    warmup = recipe.model.bottleneck.warmup_epochs
    student = Student(state.network, read_memory=warmup is not None and position.epoch >= warmup)

    def update(labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> dict[str, Tensor]:
        micro_batches = split_micro_batches(labeled, unlabeled, micro_batch_size(recipe, distributed.world_size()))
        losses: list[dict[str, Tensor]] = []
        for number, (x, u) in enumerate(micro_batches, start=1):
            with sync_gradients(state.network, enabled=number == len(micro_batches)):
                with autocast(recipe.precision, state.device), low_precision(state):
                    if burn_in:
                        losses.append(state.method.supervised_losses(student, x))
                    else:
                        losses.append(state.method.losses(student, x, u, progress))
                state.stepper.backward(losses[-1]["loss"] / len(micro_batches))
        state.stepper.step()
        return mean_losses(losses)

    if state.graphs is None:
        losses = update(labeled, unlabeled)
    else:
        losses = state.graphs((burn_in, student.read_memory), update, labeled, unlabeled)
    state.method.after_step(student, progress)
    return losses


def low_precision(state: TrainState) -> AbstractContextManager:
    """Context in which the weights of all encoders have the precision of autocast; `compile` casts by itself."""
    dtype = AUTOCAST.get(state.recipe.precision)
    if dtype is None or state.recipe.compile:
        return nullcontext()
    return cast_weights([network.encoder for network in state.networks], dtype)


def seed_step(seed: int, step: int) -> None:
    """Make dropout and drop path a function of (seed, step, rank), so that no generator state has to be saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + distributed.rank())
