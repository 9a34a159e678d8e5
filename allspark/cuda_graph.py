"""Replaying a training step as one CUDA graph: the host launches one graph instead of thousands of kernels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from allspark import distributed
from allspark.config import Recipe
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.engine.stepper import Stepper
from allspark.methods import Method
from allspark.models.timm_encoder import PREFIX
from allspark.utils.errors import UserError, reason_of

WARMUP = 3  # eager steps before a capture, in which libraries and optimizer create their state

Losses = dict[str, Tensor]
Update = Callable[[LabeledBatch, UnlabeledBatch | None], Losses]


def build_graphs(recipe: Recipe, method: Method, stepper: Stepper) -> GraphedUpdate | None:
    """CUDA graphs for the steps of a run, or None if steps are launched eagerly.

    Args:
        recipe: of the run.
        method: of the recipe.
        stepper: its optimizer is prepared for the capture.
    """
    if why_eager(recipe, method, stepper.device) is not None:
        return None
    for group in stepper.optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=stepper.device)
        if "capturable" in group:  # of Adam
            group["capturable"] = True
    return GraphedUpdate()


def why_eager(recipe: Recipe, method: Method, device: torch.device) -> str | None:
    """Why the steps of a run are not replayed as CUDA graphs; None if they are."""
    reasons = {
        "the device is not a CUDA GPU": device.type != "cuda",
        "cuda_graph=false": not recipe.cuda_graph,
        "several processes": distributed.world_size() > 1,
        # Not inherited: a subclass may use the step number
        f"method {recipe.method.name} is not marked as capturable": not vars(type(method)).get("capturable", False),
        "compile=true": recipe.compile,
        "an encoder of timm, which may read values from the device": recipe.model.encoder.startswith(
            (PREFIX, "dinov2_")
        ),
        "model.checkpointing=true, which saves the host's random state": recipe.model.checkpointing,
        "model.bottleneck.own_channels=true, which draws on the host": recipe.model.bottleneck.own_channels,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class GraphedUpdate:
    """Captures the update of a kind of step after a few eager ones, and replays it from then on.

    Eager and replayed steps run the same kernels. Whatever depends on the step number is outside the graph or read at
    each replay: the learning rate is a tensor, dropout reads the generator's seed, the EMA teacher is updated eagerly.
    One graph exists at a time: a run passes through its kinds of steps (burn-in, memory not read, memory read) once.

    Args:
        capture: (update, labeled, unlabeled) -> a Graph.
    """

    def __init__(self, capture: Callable[..., Graph] | None = None) -> None:
        self.capture = capture or Graph
        self.key: Hashable = None
        self.seen = 0  # steps of the current kind
        self.graph: Graph | None = None

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
            self.key, self.seen, self.graph = key, 0, None
        self.seen += 1
        if self.graph is None and self.seen > WARMUP:
            self.graph = self.capture(update, labeled, unlabeled)
        return update(labeled, unlabeled) if self.graph is None else self.graph.replay(labeled, unlabeled)

    def make_room(self) -> None:
        """Drop the graph, whose memory nothing else can use, if less than a quarter of the GPU is free.

        Called before an evaluation. The next steps run eagerly until the next capture.
        """
        free, total = torch.cuda.mem_get_info()
        if free < total / 4:
            self.seen, self.graph = 0, None


class Graph:
    """One captured update, with the tensors that it reads and writes.

    Raises:
        UserError: the update cannot be captured. The run must end then: gradients, the loss scaler and the random
            generator are left as in the middle of a step.
    """

    def __init__(self, update: Update, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> None:
        self.batches = tuple(map(clone, (labeled, unlabeled)))
        try:
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: the loader's threads may pin memory meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.losses = update(*self.batches)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"this step cannot be captured in a CUDA graph ({reason_of(error)}); set cuda_graph=false and run the "
                "same command again"
            ) from error

    def replay(self, labeled: LabeledBatch, unlabeled: UnlabeledBatch | None) -> Losses:
        for static, value in zip(tensors_of(*self.batches), tensors_of(labeled, unlabeled), strict=True):
            static.copy_(value)
        self.graph.replay()
        return {name: loss.clone() for name, loss in self.losses.items()}  # the next replay overwrites them


Batch = LabeledBatch | UnlabeledBatch | None


def tensors_of(*batches: Batch) -> list[Tensor]:
    """All tensors of some batches, in a fixed order."""
    fields = [
        getattr(batch, field.name) for batch in batches if batch is not None for field in dataclasses.fields(batch)
    ]
    return [tensor for value in fields for tensor in ([value] if isinstance(value, Tensor) else value)]


def clone(batch: Batch) -> Batch:
    """A copy of a batch with tensors of its own."""
    return None if batch is None else copy.deepcopy(batch)
