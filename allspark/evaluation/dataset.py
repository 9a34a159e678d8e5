"""Labeled images at their own size: read one at a time, shared among ranks, batched by size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from allspark.config import MIN_SIDE, Size, height_width
from allspark.data.mask_io import read_pair
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.transforms import to_tensor
from allspark.utils.errors import UserError

Item = tuple[Tensor, Tensor, str]  # image (C, H, W) uint8, mask (H, W) uint8, name


class SegmentationDataset(Dataset):
    """Labeled images for evaluation; an item is image (C, H, W) uint8, mask (H, W) uint8, file name without suffix.

    Args:
        samples: images with masks.
        spec: of their data set.
        center_crop: cut images and masks to their center, at most of this size.
    """

    def __init__(self, samples: Sequence[Sample], spec: DatasetSpec, center_crop: Size | None = None) -> None:
        self.samples = samples
        self.spec = spec
        self.center_crop = center_crop

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        image, mask = read_pair(sample, self.spec)
        if self.center_crop is not None:
            check_min_size(mask, sample.image)
            rows, columns = center_region(*mask.shape, self.center_crop)
            image, mask = image[rows, columns], mask[rows, columns]
        return to_tensor(image), torch.from_numpy(mask), sample.image.stem


def center_region(height: int, width: int, size: Size) -> tuple[slice, slice]:
    """Rows and columns of the center of an image, at most of this size."""
    rows, columns = map(min, height_width(size), (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def check_min_size(image: Tensor, name: object) -> None:
    """Raise UserError if an image (..., H, W) is smaller than the models accept."""
    height, width = image.shape[-2:]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{name}: {width} x {height} pixels; the model needs at least {MIN_SIDE} on each side; "
            "leave it out, or enlarge it"
        )


class Shard(Dataset):
    """Every `step`-th item from `first` on. A UserError is returned: raised, it would carry the worker's traceback."""

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
    """Stack items of equal size, without padding. A UserError among the items is raised.

    Args:
        items: tuples of an image (3, H, W), further tensors of that size, and a name.

    Yields:
        For each size the stacked tensors [(B, 3, H, W), ...] and the names.
    """
    groups: dict[torch.Size, list[tuple]] = {}
    for item in items:
        if isinstance(item, UserError):
            raise item
        groups.setdefault(item[0].shape, []).append(item)
    for group in groups.values():
        *tensors, names = zip(*group, strict=True)
        yield [torch.stack(each) for each in tensors], list(names)
