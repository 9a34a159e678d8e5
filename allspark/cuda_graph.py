"""Replaying a training step as one CUDA graph: the host launches one graph instead of thousands of kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from allspark import distributed
from allspark.config import Recipe
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.engine.stepper import Stepper
from allspark.methods import Method

WARMUP = 3  # eager steps before a capture, in which libraries and optimizer create their state

Losses = dict[str, Tensor]
Update = Callable[[LabeledBatch, UnlabeledBatch | None], Losses]


def build_graphs(
    recipe: Recipe, method: Method, stepper: Stepper, log_fn: Callable[[str], None]
) -> GraphedUpdate | None:
    """CUDA graphs for the steps of a run; None if cuda_graph is false or its steps cannot be captured.

    Args:
        recipe: of the run.
        method: of the recipe.
        stepper: its optimizer's learning rates become tensors, which a graph reads.
        log_fn: for messages.
    """
    prevented = (
        not recipe.cuda_graph
        or stepper.device.type != "cuda"
        or distributed.world_size() > 1
        or not method.capturable
        or recipe.compile
        or recipe.model.checkpointing  # saves the state of the random generator on the host
        or recipe.model.bottleneck.own_channels  # draws on the host
    )
    if prevented:
        return None
    for group in stepper.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=stepper.device)
    return GraphedUpdate(log_fn)


class GraphedUpdate:
    """Captures the update of a kind of step after a few eager ones, and replays it from then on.

    Eager and replayed steps run the same kernels. Whatever depends on the step number is outside the graph or read at
    each replay: the learning rate is a tensor, dropout reads the generator's seed, the EMA teacher is updated eagerly.
    One graph exists at a time: a run passes through its kinds of steps (burn-in, memory not read, memory read) once.

    Args:
        capture: (update, labeled, unlabeled) -> a Graph.
        log_fn: receives a message if a step cannot be captured; all steps are eager then.
    """

    def __init__(self, log_fn: Callable[[str], None], capture: Callable[..., Graph] | None = None) -> None:
        self.log_fn, self.capture = log_fn, capture or Graph
        self.key: Hashable = None
        self.eager_steps = 0
        self.graph: Graph | None = None
        self.failed = False

    def __call__(
        self, kind: Hashable, update: Update, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None
    ) -> Losses:
        """Run one update, eagerly or as a graph.

        Args:
            kind: everything that the update depends on besides the tensors of the batch.
            update: forward pass, backward pass and optimizer step on a batch; returns the losses.
            labeled, unlabeled: on the device. Other shapes are another kind of step.
        """
        key = (kind, *(tensor.shape for tensor in tensors_of(labeled, unlabeled)))
        if key != self.key:
            self.key, self.eager_steps, self.graph = key, 0, None
        if self.graph is None and self.eager_steps >= WARMUP and not self.failed:
            try:
                self.graph = self.capture(update, labeled, unlabeled)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.failed = True
                self.log_fn(f"WARNING: CUDA graphs are off, a step cannot be captured: {str(error).splitlines()[0]}")
        self.eager_steps += 1
        return update(labeled, unlabeled) if self.graph is None else self.graph.replay(labeled, unlabeled)


class Graph:
    """One captured update, with the tensors that it reads and writes."""

    def __init__(self, update: Update, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> None:
        self.labeled, self.unlabeled = clone(labeled), clone(unlabeled)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads may pin memory meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.losses = update(self.labeled, self.unlabeled)

    def replay(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> Losses:
        inputs = tensors_of(self.labeled, self.unlabeled)
        for static, value in zip(inputs, tensors_of(labeled, unlabeled), strict=True):
            static.copy_(value)
        self.graph.replay()
        return {name: loss.clone() for name, loss in self.losses.items()}  # the next replay overwrites them


def tensors_of(labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> list[Tensor]:
    """All tensors of a step's batches, in a fixed order."""
    found = [labeled.image, labeled.mask]
    if unlabeled is not None:
        found += [unlabeled.weak, *unlabeled.strong, unlabeled.valid, *unlabeled.cutmix]
    return found


def clone(batch: Any) -> Any:
    """A copy of a batch with new tensors; None for None."""
    if batch is None:
        return None
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return type(batch)(
        **{name: v.clone() if isinstance(v, Tensor) else tuple(t.clone() for t in v) for name, v in values.items()}
    )
