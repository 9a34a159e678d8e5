"""bench loader: images per second from files to normalized tensors on the device, ours and the plain implementation."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from allspark.bench.measure import Row, Run, Side, measure
from allspark.bench.photos import LIKENESSES, write_photos
from allspark.bench.plain import PlainStream
from allspark.config import DataConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.data.datasets import spec_for
from allspark.data.loaders import LABELED, UNLABELED, TrainLoader, TrainPairs
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import Lists
from allspark.data.worker_pool import make_loader
from allspark.utils.errors import UserError

VIEWS = Views(labeled="strong")  # of the released recipe: labeled strong, unlabeled weak
SEED = 0


@dataclass(frozen=True)
class LoaderCase:
    """Kind of files (a key of LIKENESSES), workers, batch size, and number of files; images None: the default."""

    name: str
    workers: int = 2
    batch: int = 2
    images: int | None = None


class Stream(Dataset):
    """One stream of TrainPairs, by index: the view (3, crop, crop) uint8, and the mask or the valid pixels."""

    def __init__(self, pairs: TrainPairs, stream: int) -> None:
        self.pairs, self.stream = pairs, stream
        self.samples = (pairs.lists.labeled, pairs.lists.unlabeled)[stream]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample, key = self.samples[index], (SEED, 0, index, self.stream)
        if self.stream == LABELED:
            made = self.pairs.labeled(sample, key)
            return made.image, made.mask
        made = self.pairs.unlabeled(sample, key)
        return made.weak, made.valid


class Both(Dataset):
    """The items of two data sets side by side."""

    def __init__(self, first: Dataset, second: Dataset) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.first[index], self.second[index]


def bench_loader(case: LoaderCase, folder: Path, repeats: int, device: torch.device) -> tuple[list[Row], list[str]]:
    """Rows of each stream alone and of both together, and notes; the files are written to folder."""
    like = LIKENESSES[case.name]
    data = DataConfig(dataset=like.dataset, data_root=str(folder), crop_size=like.crop, num_workers=case.workers)
    spec = spec_for(data)
    count = case.images or like.files
    if count % case.batch:  # our loader drops an incomplete batch, the plain one does not
        raise UserError(f"--images {count}: must be a multiple of the batch of {case.batch}")
    samples = tuple(write_photos(folder / "files", like, spec, count))
    lists = Lists(samples, tuple(Sample(sample.image) for sample in samples), (), "", case.name)
    makers = {"ours": data, "ours, cache": replace(data, cache=str(folder / "cache"))}
    rows = []
    for what in ("labeled", "unlabeled", "both"):
        sides = [Side("plain", run_plain(what, lists, spec, data, case, device), baseline=True)]
        sides += [Side(name, run_ours(what, lists, spec, made, case, device)) for name, made in makers.items()]
        title = f"{case.name}-like {like.size[0]}x{like.size[1]} {like.suffix[1:].upper()}, crop {like.crop}, {what}"
        images = (2 if what == "both" else 1) * len(samples)
        rows += measure(title, sides, repeats, device, images=images, work=False)
    size = sum(sample.image.stat().st_size for sample in samples) / len(samples)
    return rows, [f"{case.name}-like: {len(samples)} made-up images of {size / 1e6:.2f} MB, {case.workers} workers"]


def persistent_loader(dataset: Dataset, case: LoaderCase, device: torch.device) -> DataLoader:
    """A loader whose workers stay alive between passes, as in training."""
    return make_loader(
        dataset,
        case.workers,
        persistent_workers=case.workers > 0,
        pin_memory=device.type == "cuda",
        batch_size=case.batch,
    )


def run_plain(
    what: str, lists: Lists, spec: DatasetSpec, data: DataConfig, case: LoaderCase, device: torch.device
) -> Run:
    """A pass over all images of a stream, or of both."""
    labeled = PlainStream(lists.labeled, spec, data, SEED, LABELED, strong=True)
    unlabeled = PlainStream(lists.unlabeled, spec, data, SEED, UNLABELED, strong=False)
    dataset = {"labeled": labeled, "unlabeled": unlabeled, "both": Both(labeled, unlabeled)}[what]
    loader = persistent_loader(dataset, case, device)

    def run() -> None:
        for batch in loader:
            for tensor in tree_leaves(batch):
                tensor.to(device, non_blocking=True)

    return run


def run_ours(
    what: str, lists: Lists, spec: DatasetSpec, data: DataConfig, case: LoaderCase, device: torch.device
) -> Run:
    """The same with TrainPairs, or with TrainLoader for both streams."""
    if what == "both":
        train_loader = TrainLoader(lists, spec, data, VIEWS, case.batch, SEED)
        return lambda: deque(train_loader.on(device), maxlen=0)
    pairs = TrainPairs(lists, spec, data, VIEWS, SEED)
    pairs.open_cache()
    stream = Stream(pairs, LABELED if what == "labeled" else UNLABELED)
    loader = persistent_loader(stream, case, device)

    def run() -> None:
        for view, mask in loader:
            batch = LabeledBatch(view, mask) if what == "labeled" else UnlabeledBatch(view, (), mask, ())
            batch.to(device)

    return run
