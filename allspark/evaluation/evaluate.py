"""Evaluating a model on a labeled data set; the result is the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from allspark import distributed
from allspark.data.batch import normalize
from allspark.data.spec import DatasetSpec
from allspark.data.worker_pool import TIMEOUT, iterate, make_loader
from allspark.evaluation.dataset import Shard, group_by_size
from allspark.evaluation.metrics import ConfusionMatrix, EvalResult
from allspark.evaluation.sliding_window import Inference, best_class, check_size, class_scores
from allspark.evaluation.tiled import needs_tiling, tiled_scores
from allspark.models.eval_mode import eval_mode
from allspark.utils.errors import UserError
from allspark.utils.progress import disable_bar

Save = Callable[[str, Tensor, Tensor, Tensor], None]  # name, image, mask, prediction: uint8 on the CPU, of one size


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    spec: DatasetSpec,
    device: torch.device,
    inference: Inference,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    timeout: float = TIMEOUT,
    progress: bool = False,
    save: Save | None = None,
    absent_as_zero: bool = False,
) -> EvalResult:
    """Evaluate on `dataset`. Rank r of P takes items r, r + P, ..., so no image counts twice; all ranks get the result.

    Args:
        model: evaluated in eval mode; training flags are restored afterwards.
        dataset: yields evaluation.dataset.Item.
        spec: classes, palette and normalization of the data set.
        device: of the model.
        inference: whole images, windows or the center; scales and flip.
        batch_size: images per forward pass; only images of equal size are batched.
        num_workers: loader processes.
        progress: show a bar.
        timeout: seconds without a batch after which a loader worker counts as hung.
        save: called with each image on the rank that has it; prediction is ignore_index outside the center crop.
        absent_as_zero: count classes absent from prediction and label as IoU 0 in the mean, as the released code does.

    Returns:
        Metrics over all images.

    Raises:
        UserError: the dataset is empty, or a file is unreadable.
    """
    if len(dataset) == 0:
        raise UserError("the evaluation list is empty: nothing to evaluate")
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index, device)
    shard = Shard(dataset, distributed.rank(), distributed.world_size())
    loader = make_loader(shard, num_workers, timeout=timeout, batch_size=batch_size, collate_fn=list)
    hidden = disable_bar(progress and distributed.is_main())
    for items in tqdm(iterate(loader), "evaluate", len(loader), unit="batch", leave=False, disable=hidden):
        for (image, mask), names in group_by_size(items):
            prediction = predict(model, image, spec, device, inference, names)
            rows, columns = inference.region(*mask.shape[-2:])
            confusion.update(prediction[:, rows, columns], mask[:, rows, columns].to(device))
            if save is not None:
                for name, *tensors in zip(names, image, mask, prediction.cpu(), strict=True):
                    save(name, *tensors)
    confusion.matrix = distributed.all_reduce_sum(confusion.matrix)
    return confusion.result(len(dataset), absent_as_zero=absent_as_zero)


def predict(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> Tensor:
    """Predict the classes of a batch of images of one size.

    Args:
        image: (B, C, H, W) uint8.
        names: of the images, for error messages.

    Returns:
        (B, H, W) uint8 class indices on the device; ignore_index outside the center crop.
    """
    if needs_tiling(image.shape, spec.num_classes, inference):
        return predict_tiled(model, image, spec, device, inference, names)[0]
    scores = region_scores(model, image, spec, device, inference, names)
    label = scores.max(1)[1].to(torch.uint8)  # max, not argmax: several times faster on NCHW
    return paste_region(label, image, inference, spec.ignore_index)


def predict_with_confidence(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> tuple[Tensor, Tensor]:
    """As `predict`, and the probability of the predicted class (B, H, W) float, 0 outside the center crop."""
    if needs_tiling(image.shape, spec.num_classes, inference):
        return predict_tiled(model, image, spec, device, inference, names)
    label, prob = best_class(region_scores(model, image, spec, device, inference, names), inference)
    label = paste_region(label.to(torch.uint8), image, inference, spec.ignore_index)
    return label, paste_region(prob, image, inference, 0)


def predict_tiled(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> tuple[Tensor, Tensor]:
    """As `predict_with_confidence` by sliding windows, keeping the class scores of a strip of rows only."""
    check_size(image, names[0], inference)
    label = torch.empty(image[:, 0].shape, dtype=torch.uint8, device=device)
    prob = torch.empty(label.shape, device=device)
    with eval_mode(model):
        for rows, scores in tiled_scores(model, image, device, inference, spec.statistics):
            check_classes(scores, spec)
            prob[:, rows], best = scores.max(1)
            label[:, rows] = best.to(torch.uint8)
    return label, prob


def region_scores(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> Tensor:
    """class_scores of the predicted region: uint8 (B, C, H, W) -> (B, K, rows, columns)."""
    check_size(image, names[0], inference)
    rows, columns = inference.region(*image.shape[-2:])
    scores = class_scores(model, normalize(image[..., rows, columns].to(device), spec.statistics), inference)
    check_classes(scores, spec)
    return scores


def check_classes(scores: Tensor, spec: DatasetSpec) -> None:
    """Raise UserError unless scores (B, K, ...) have the data set's number of classes."""
    if scores.shape[1] != spec.num_classes:
        raise UserError(
            f"the model has {scores.shape[1]} classes, data set {spec.name} has {spec.num_classes}: "
            "evaluate it on the data set it was trained for"
        )


def paste_region(values: Tensor, image: Tensor, inference: Inference, outside: int) -> Tensor:
    """Values (B, rows, columns) of the region at their place in the image: (B, H, W), `outside` around them."""
    height, width = image.shape[-2:]
    rows, columns = inference.region(height, width)
    full = values.new_full((len(image), height, width), outside)
    full[:, rows, columns] = values
    return full
