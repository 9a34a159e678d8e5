"""bench step: the training step of AllSpark with the memory in use, ours and the plain implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from allspark import distributed
from allspark.bench.measure import Row, Side, Work, count_work, measure
from allspark.bench.parts import describe_parts
from allspark.bench.plain import plain_copy, plain_optimizer, plain_step
from allspark.config import BottleneckConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, Recipe
from allspark.cuda_graph import build_graphs
from allspark.data.batch import LabeledBatch, UnlabeledBatch
from allspark.engine.onednn import torch_kernels
from allspark.engine.optim import build_optimizer, poly_lr
from allspark.engine.position import Position
from allspark.engine.stepper import Stepper
from allspark.losses import CrossEntropy
from allspark.methods import METHODS
from allspark.models.mit import MiTSize
from allspark.models.segmentor import ENCODERS, Segmentor, build_model
from allspark.train_step import TrainState, train_step

TOTAL_STEPS = 1000  # of the run; only sets the learning rate


@dataclass(frozen=True)
class StepCase:
    """A step on `batch` labeled and as many unlabeled images over all processes."""

    encoder: str = "mit_b0"
    crop: int = 257
    batch: int = 2
    classes: int = 21
    compile: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        return f"{self.encoder}, crop {self.crop}, {self.batch}+{self.batch}, {self.classes} classes"

    @property
    def model(self) -> ModelConfig:
        bottleneck = BottleneckConfig(name="allspark", warmup_epochs=0)
        return ModelConfig(encoder=self.encoder, checkpointing=self.checkpointing, bottleneck=bottleneck)


@dataclass(frozen=True)
class StepBatch:
    """The share of one process: images (B, 3, H, W), normalized, and mask (B, H, W) int64, on its device."""

    image_x: Tensor
    mask: Tensor
    image_u: Tensor

    @classmethod
    def of(cls, case: StepCase, device: torch.device) -> StepBatch:
        share, generator = case.batch // distributed.world_size(), torch.Generator().manual_seed(distributed.rank())
        size = (share, 3, case.crop, case.crop)
        image_x, image_u = (torch.randn(size, generator=generator).to(device) for _ in range(2))
        coarse = torch.randint(case.classes, (share, 1, 8, 8), generator=generator).float()
        mask = F.interpolate(coarse, (case.crop, case.crop))[:, 0].long()
        return cls(image_x, mask.to(device), image_u)


def bench_step(
    case: StepCase, precisions: Sequence[str], sides: Sequence[str], repeats: int, device: torch.device
) -> tuple[list[Row], list[str]]:
    """Measure a step.

    Args:
        case: model and batch.
        precisions: of our side.
        sides: of plain, ours, transformers.
        repeats: rounds.
        device: of the step.

    Returns:
        Rows, and notes: the parts of a step, and what was not measured.
    """
    torch.manual_seed(0)
    model = build_model(case.model, case.classes, case.crop).to(device)
    batch = StepBatch.of(case, device)
    chosen = [plain_side(case, model, batch)] if "plain" in sides else []
    if "ours" in sides:
        chosen += [our_side(case, model, precision, batch) for precision in precisions]
    rows = measure(str(case), chosen, repeats, device, images=2 * case.batch) if chosen else []
    notes = []
    if "ours" in sides and distributed.world_size() == 1:
        eager = [our_side(case, model, precision, batch, cuda_graph=False) for precision in precisions]
        notes += [describe_parts(side, device) for side in eager]
        if device.type == "cuda":  # a replayed graph dispatches nothing that could be counted
            for side in eager:
                row = next(row for row in rows if (row.side, row.precision) == (side.name, side.precision))
                row.work = count_work(side, device)
    for row in rows:  # counted in this process; each of the others has the same cost
        row.work = Work(*(count * distributed.world_size() for count in vars(row.work).values()))
    if "transformers" in sides:
        if importlib.util.find_spec("transformers"):
            rows += against_transformers(case, model, batch, repeats, device)
        else:
            notes.append("transformers is not installed: its SegFormer was not measured")
    return rows, notes


def our_side(case: StepCase, source: Segmentor, precision: str, batch: StepBatch, cuda_graph: bool = True) -> Side:
    """The step of train.py, on a copy of the weights."""
    device = batch.image_x.device
    model = build_model(case.model, case.classes, case.crop).to(device).train()
    model.load_state_dict(source.state_dict())
    data = DataConfig(dataset="bench", data_root="", crop_size=case.crop)
    recipe = Recipe(
        data=data,
        model=case.model,
        method=MethodConfig(name="allspark"),
        batch_size=case.batch,
        epochs=1,
        precision=precision,
        compile=case.compile,
        cuda_graph=cuda_graph,
    )
    method = METHODS["allspark"](CrossEntropy())
    method.attach(model)
    stepper = Stepper(model, build_optimizer(recipe.optim, model), precision)
    network: nn.Module = model
    if distributed.world_size() > 1:
        network = DistributedDataParallel(model, broadcast_buffers=False)
    if case.compile:
        model.compile_parts()
    graphs = build_graphs(recipe, method, stepper)
    state = TrainState(recipe, network, method, stepper, TOTAL_STEPS, graphs)
    labeled = LabeledBatch(batch.image_x, batch.mask)
    unlabeled = UnlabeledBatch(batch.image_u, (), torch.ones_like(batch.mask, dtype=torch.bool), ())

    def run() -> None:
        train_step(state, labeled, unlabeled, Position(), poly_lr(recipe.optim, 0, TOTAL_STEPS))

    return Side("ours", run, precision, model=model, optimizer=stepper.optimizer)


def plain_side(case: StepCase, source: Segmentor, batch: StepBatch) -> Side:
    model = plain_copy(source, case.model)
    optimizer = plain_optimizer(OptimConfig(), model)

    @torch_kernels()
    def run() -> None:
        plain_step(model, optimizer, batch.image_x, batch.mask, batch.image_u)

    return Side("plain", run, baseline=True, clear=optimizer.zero_grad)


def against_transformers(
    case: StepCase, source: Segmentor, batch: StepBatch, repeats: int, device: torch.device
) -> list[Row]:
    """Supervised step of encoder and decoder on as many images as the joint pass: plain and transformers."""
    image, mask = torch.cat((batch.image_x, batch.image_u)), torch.cat((batch.mask, batch.mask))
    plain = plain_copy(source, case.model).train()
    plain.bottleneck = None
    theirs = transformers_segformer(ENCODERS[case.encoder].args[0], case.classes).to(device).train()
    name = f"{case.encoder} without bottleneck, crop {case.crop}, {len(image)} images, {case.classes} classes"
    sides = [
        supervised("transformers", theirs, lambda: theirs(image, labels=mask).loss, baseline=True),
        supervised("plain", plain, lambda: F.cross_entropy(plain(image), mask, ignore_index=255)),
    ]
    return measure(name, sides, repeats, device, images=len(image))


def transformers_segformer(size: MiTSize, num_classes: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=list(size.depths),
        hidden_sizes=list(size.channels),
        decoder_hidden_size=size.decoder_channels,
        num_labels=num_classes,
    )
    return SegformerForSemanticSegmentation(config)


def supervised(name: str, model: nn.Module, loss_of: Callable[[], Tensor], baseline: bool = False) -> Side:
    """A side with forward pass, backward pass and SGD step."""
    cfg = OptimConfig()
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)

    @torch_kernels()
    def run() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return Side(name, run, baseline=baseline, clear=optimizer.zero_grad)
