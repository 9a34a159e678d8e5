"""The evaluation loop: a model and a labeled data set -> Scores, the same for one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from allspark import distributed
from allspark.data.image_io import MIN_SIDE
from allspark.data.spec import DatasetSpec
from allspark.data.batch import normalize
from allspark.data.worker_pool import TIMEOUT, iterate, make_loader
from allspark.evaluation.metrics import ConfusionMatrix, EvalResult
from allspark.evaluation.sliding_window import Inference, best_class, class_scores, eval_mode
from allspark.evaluation.tiled import needs_tiling, tiled_scores
from allspark.utils.errors import UserError

Item = tuple[Tensor, Tensor, str]  # image (3, H, W) uint8, mask (H, W) uint8, name
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
    """Scores over `dataset`, whose items are Items; the model keeps its training flags, and every rank gets the result.

    Rank r of P takes items r, r + P, ...: none twice, and the set's size need not divide. `save` is called on the rank
    that has the image, with ignore_index outside the center crop. Raises UserError for an empty set or unreadable file.
    """
    if len(dataset) == 0:
        raise UserError("the evaluation list names no image: nothing to evaluate")
    confusion = ConfusionMatrix(spec.num_classes, spec.ignore_index, device)
    shard = Shard(dataset, distributed.rank(), distributed.world_size())
    loader = make_loader(shard, num_workers, timeout=timeout, batch_size=batch_size, collate_fn=list)
    hidden = None if progress and distributed.is_main() else True  # None: hidden where stderr is no terminal
    for items in tqdm(iterate(loader), "evaluate", len(loader), unit="batch", leave=False, disable=hidden):
        for (image, mask), names in group_by_size(items):
            prediction = predict(model, image, spec, device, inference, names)
            rows, columns = inference.region(*mask.shape[-2:])
            confusion.update(prediction[:, rows, columns], mask[:, rows, columns].to(device))
            if save is not None:
                for name, *tensors in zip(names, image, mask, prediction.cpu(), strict=True):
                    save(name, *tensors)
    confusion.matrix = distributed.all_reduce_sum(confusion.matrix)
    return confusion.scores(len(dataset), absent_as_zero=absent_as_zero)


def predict(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> Tensor:
    """uint8 image (B, 3, H, W) -> uint8 class indices (B, H, W) on the device, ignore_index outside the center crop."""
    if needs_tiling(image.shape, spec.num_classes, inference):
        return predict_tiled(model, image, spec, device, inference, names)[0]
    scores = region_scores(model, image, spec, device, inference, names)
    label = scores.max(1)[1].to(torch.uint8)  # max, not argmax: several times faster on NCHW
    return paste_region(label, image, inference, spec.ignore_index)


def predict_with_confidence(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> tuple[Tensor, Tensor]:
    """What predict gives, and the probability of each pixel's class: float (B, H, W), 0 outside the center crop."""
    if needs_tiling(image.shape, spec.num_classes, inference):
        return predict_tiled(model, image, spec, device, inference, names)
    label, prob = best_class(region_scores(model, image, spec, device, inference, names), inference)
    label = paste_region(label.to(torch.uint8), image, inference, spec.ignore_index)
    return label, paste_region(prob, image, inference, 0)


def predict_tiled(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> tuple[Tensor, Tensor]:
    """What predict_with_confidence gives by sliding windows, with the scores of no more than a strip in memory."""
    check_min_size(image, names[0])
    label = torch.empty(image[:, 0].shape, dtype=torch.uint8, device=device)
    prob = torch.empty(label.shape, device=device)
    with eval_mode(model):
        for rows, scores in tiled_scores(model, image, inference, device):
            check_classes(scores, spec)
            prob[:, rows], best = scores.max(1)
            label[:, rows] = best.to(torch.uint8)
    return label, prob


def region_scores(
    model: nn.Module, image: Tensor, spec: DatasetSpec, device: torch.device, inference: Inference, names: list[str]
) -> Tensor:
    """class_scores of the part of the images that is predicted: uint8 (B, 3, H, W) -> (B, K, rows, columns)."""
    check_min_size(image, names[0])
    rows, columns = inference.region(*image.shape[-2:])
    scores = class_scores(model, normalize(image[..., rows, columns].to(device)), inference)
    check_classes(scores, spec)
    return scores


def check_classes(scores: Tensor, spec: DatasetSpec) -> None:
    """UserError unless scores (B, K, ...) are of the classes of the data set."""
    if scores.shape[1] != spec.num_classes:
        raise UserError(
            f"the model has {scores.shape[1]} classes, data set {spec.name} has {spec.num_classes}: "
            "evaluate it on the data set that it was trained for"
        )


def paste_region(values: Tensor, image: Tensor, inference: Inference, outside: int) -> Tensor:
    """Values (B, rows, columns) of the region in their place in the images: (B, H, W), `outside` around them."""
    height, width = image.shape[-2:]
    rows, columns = inference.region(height, width)
    whole = values.new_full((len(image), height, width), outside)
    whole[:, rows, columns] = values
    return whole


def check_min_size(image: Tensor, name: object) -> None:
    """UserError if an image (..., H, W) is smaller than the models can take."""
    height, width = image.shape[-2:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{name}: {width} x {height} pixels; the model needs at least {MIN_SIDE} on each side")


class Shard(Dataset):
    """Every `step`-th item from `first` on. A UserError is returned: a worker would send it on with its traceback."""

    def __init__(self, dataset: Dataset, first: int, step: int) -> None:
        self.dataset = dataset
        self.indices = range(first, len(dataset), step)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item | UserError:
        try:
            return self.dataset[self.indices[position]]
        except UserError as error:
            return error


def group_by_size(items: Iterable[tuple | UserError]) -> Iterator[tuple[list[Tensor], list[str]]]:
    """Stack the items of each size, an image (3, H, W), what belongs to it, a name -> [(B, 3, H, W), ...], names.

    No padding, so no pixel is invented. A UserError among the items is raised.
    """
    groups: dict[torch.Size, list[tuple]] = {}
    for item in items:
        if isinstance(item, UserError):
            raise item
        groups.setdefault(item[0].shape, []).append(item)
    for group in groups.values():
        *tensors, names = zip(*group, strict=True)
        yield [torch.stack(each) for each in tensors], list(names)
