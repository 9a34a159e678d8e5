"""The training loader: from files to batches on the device.

The randomness of a sample depends only on (seed, epoch, global position, stream), not on the worker, the rank or
earlier samples. So resuming means starting the sampler at a step, and any number of processes draws the same samples.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data import default_collate as stack  # collates into shared memory; torch.stack would be copied

from allspark import distributed
from allspark.config import DataConfig
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.data.cache import SampleReader, open_reader
from allspark.data.image_files import BadSample
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import Lists
from allspark.data.transforms import OPERATIONS, PHOTOMETRIC, Geometry, cutmix_box, draw_geometry, to_tensor
from allspark.data.worker_pool import iterate, kill_workers, make_loader, worker_count
from allspark.utils.errors import UserError

LABELED, UNLABELED = 0, 1  # random streams
REPLACEMENT = 1_000_000  # of the stream that chooses replacements for a sample
REPLACEMENTS = 10  # consecutive attempts
Key = tuple[int, int, int, int]  # epoch, global position, labeled index, unlabeled index (-1: none)
Step = tuple[LabeledBatch, UnlabeledBatch | None]
Part = TypeVar("Part", LabeledBatch, UnlabeledBatch)


class TrainItem(NamedTuple):
    """What a worker sends: one pair or, collated, a step; bad: an error message for each sample that was replaced."""

    labeled: LabeledBatch
    unlabeled: UnlabeledBatch | None
    bad: tuple[str, ...] = ()


class TrainPairs(Dataset):
    """Pairs of one labeled and one unlabeled image, as the views the method asks for, by Key.

    A UserError is returned instead of raised: raised in a worker, its message would be the worker's traceback.
    """

    def __init__(self, lists: Lists, spec: DatasetSpec, data: DataConfig, views: Views, seed: int) -> None:
        self.lists, self.spec, self.data, self.views, self.seed = lists, spec, data, views, seed
        self.files = SampleReader(spec)

    def open_cache(self) -> None:
        """Read through data.cache from now on; write it first if needed."""
        unlabeled = self.lists.unlabeled if self.views.unlabeled else ()
        images = [sample.image for sample in (*self.lists.labeled, *unlabeled)]
        masks = [sample.mask for sample in self.lists.labeled]
        skip = self.data.on_bad_sample == "skip"
        self.files = open_reader(self.data.cache, self.spec, images, masks, skip)

    def __getitem__(self, key: Key) -> TrainItem | UserError:
        epoch, position, index, unlabeled_index = key
        bad: list[str] = []
        try:
            stream = (self.seed, epoch, position, LABELED)
            labeled, unlabeled = self.load(self.labeled, self.lists.labeled, index, stream, bad), None
            if self.views.unlabeled:
                stream = (self.seed, epoch, position, UNLABELED)
                unlabeled = self.load(self.unlabeled, self.lists.unlabeled, unlabeled_index, stream, bad)
            return TrainItem(labeled, unlabeled, tuple(bad))
        except UserError as error:
            return error

    def load(
        self,
        make: Callable[[Sample, tuple[int, ...]], Part],
        samples: Sequence[Sample],
        index: int,
        stream: tuple[int, ...],
        bad: list[str],
    ) -> Part:
        """make(samples[index]); with data.on_bad_sample=skip, of another sample if that one is unreadable.

        Args:
            stream: seeds the sample's randomness and the choice of replacements.
            bad: gets a message for each unreadable sample.
        """
        tried = 0
        for sample in candidates(samples, index, stream):
            try:
                return make(sample, stream)
            except BadSample as error:
                if self.data.on_bad_sample == "error":
                    raise UserError(f"{error}; or train without it: data.on_bad_sample=skip") from None
                bad.append(str(error))
                tried += 1
        raise UserError(f"{bad[-1]}; {tried} samples in a row cannot be read: is the storage offline, or a list wrong?")

    def geometry(self, image: np.ndarray, stream: tuple[int, ...]) -> Geometry:
        height, width = image.shape[:2]
        rng = np.random.default_rng([*stream, 0])
        data = self.data
        flips = (data.horizontal_flip, data.vertical_flip, data.rotate_90)
        return draw_geometry(rng, width, height, data.crop_size, data.scale_range, *flips)

    def photometric(self, name: str, crop: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(C, h, w) uint8: the policy's view with data.photometric_probability, else the crop as it is."""
        data, probability = self.data, self.data.photometric_probability
        policy = PHOTOMETRIC[name if probability == 1 or rng.random() < probability else "weak"]
        return to_tensor(policy(crop, rng, OPERATIONS[data.photometric], data.color_strength))

    def labeled(self, sample: Sample, stream: tuple[int, ...]) -> LabeledBatch:
        """One image (C, h, w) uint8 and its mask (h, w) uint8, without a batch dimension."""
        image, mask = self.files.pair(sample)
        geometry = self.geometry(image, stream)
        view = self.photometric(self.views.labeled, geometry.image(image), np.random.default_rng([*stream, 1]))
        return LabeledBatch(view, torch.from_numpy(geometry.mask(mask, self.spec.ignore_index)))

    def unlabeled(self, sample: Sample, stream: tuple[int, ...]) -> UnlabeledBatch:
        """The views of one crop (C, h, w) uint8, and bool masks (h, w), without a batch dimension."""
        image = self.files.image(sample.image)
        geometry = self.geometry(image, stream)
        crop = geometry.image(image)
        strong, cutmix = [], []
        for number, name in enumerate(self.views.strong, start=1):
            rng = np.random.default_rng([*stream, number])
            strong.append(self.photometric(name, crop, rng))
            cutmix.append(torch.from_numpy(cutmix_box(rng, self.data.crop_size, self.views.cutmix)))
        return UnlabeledBatch(to_tensor(crop), tuple(strong), torch.from_numpy(geometry.valid()), tuple(cutmix))


def candidates(samples: Sequence[Sample], index: int, stream: tuple[int, ...]) -> Iterator[Sample]:
    """The sample itself, then up to REPLACEMENTS different others, chosen by the stream alone."""
    yield samples[index]
    order = np.random.default_rng([*stream, REPLACEMENT]).permutation(len(samples))
    for other in order[order != index][:REPLACEMENTS]:
        yield samples[other]


def collate(items: Sequence[TrainItem | UserError]) -> TrainItem | UserError:
    """Stack the items of a step; if any is an error, return that."""
    for item in items:
        if isinstance(item, UserError):
            return item
    labeled, unlabeled = [item.labeled for item in items], [item.unlabeled for item in items]
    bad = tuple(message for item in items for message in item.bad)
    batch = LabeledBatch(stack([one.image for one in labeled]), stack([one.mask for one in labeled]))
    if unlabeled[0] is None:
        return TrainItem(batch, None, bad)
    views = UnlabeledBatch(
        stack([one.weak for one in unlabeled]),
        tuple(stack(views) for views in zip(*(one.strong for one in unlabeled), strict=True)),
        stack([one.valid for one in unlabeled]),
        tuple(stack(boxes) for boxes in zip(*(one.cutmix for one in unlabeled), strict=True)),
    )
    return TrainItem(batch, views, bad)


class StepSampler(Sampler):
    """The keys of each step of an epoch for one rank: step s has positions [s B, (s + 1) B), each rank takes B / P.

    The list that defines the epoch (`primary`) is permuted anew each epoch, and the last len % B images are dropped.
    The other list runs through its own permutations across epoch boundaries, so that its images come equally often.

    Args:
        sizes: number of labeled and of unlabeled images.
        primary: LABELED or UNLABELED.
        batch_size: labeled images per step over all ranks.
    """

    def __init__(
        self, sizes: tuple[int, int], primary: int, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.sizes, self.primary, self.batch_size, self.seed = sizes, primary, batch_size, seed
        self.share = batch_size // world_size
        self.first = rank * self.share
        self.steps = sizes[primary] // batch_size
        self.epoch, self.start_step = 0, 0

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch  # set_epoch may be called while a pass is still prefetched
        labeled, unlabeled = (self.order(stream) for stream in (LABELED, UNLABELED))
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.first
            positions = range(first, first + self.share)
            yield [(epoch, position, int(labeled[position]), int(unlabeled[position])) for position in positions]

    def order(self, stream: int) -> np.ndarray:
        """Index of the image at each position of this epoch, (steps * B,) int; -1 if the list is not used."""
        size, length = self.sizes[stream], self.steps * self.batch_size
        if size == 0:
            return np.full(length, -1)
        if stream == self.primary:
            return self.permutation(stream, self.epoch)[:length]
        first = self.epoch * length
        rounds = range(first // size, (first + length - 1) // size + 1)
        return np.concatenate([self.permutation(stream, number) for number in rounds])[first % size :][:length]

    def permutation(self, stream: int, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number, stream]).permutation(self.sizes[stream])


class TrainLoader:
    """Epochs of (LabeledBatch, UnlabeledBatch | None) for one rank.

    Args:
        batch_size: labeled images per step over all ranks.
        epoch_of: 'labeled' or 'unlabeled', the list whose length defines an epoch.
    """

    def __init__(
        self,
        lists: Lists,
        spec: DatasetSpec,
        data: DataConfig,
        views: Views,
        batch_size: int,
        seed: int,
        epoch_of: str = "unlabeled",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_arguments(lists, views, batch_size, epoch_of, world_size)
        # The epoch may be that of an unlabeled list that is not read: supervised then runs as long as other methods
        primary = UNLABELED if epoch_of == "unlabeled" else LABELED
        sizes = (len(lists.labeled), len(lists.unlabeled))
        self.sampler = StepSampler(sizes, primary, batch_size, seed, rank, world_size)
        self.pairs = TrainPairs(lists, spec, data, views, seed)
        self.num_workers = worker_count(data.num_workers)
        self.loaders: dict[bool, DataLoader] = {}  # by pin_memory, created on first use
        self.bad: Counter[str] = Counter()  # error message of a replaced sample -> how often, in this process

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next call of `on` starts at this step of this epoch."""
        self.sampler.epoch, self.sampler.start_step = epoch, start_step

    def images(self, step: int) -> list[str]:
        """Files of a step (from 0) of the current epoch, over all ranks: labeled, then unlabeled."""
        positions = slice(step * self.sampler.batch_size, (step + 1) * self.sampler.batch_size)
        lists, files = self.pairs.lists, []
        for stream, samples in ((LABELED, lists.labeled), (UNLABELED, lists.unlabeled)):
            if stream == LABELED or self.pairs.views.unlabeled:
                files += [str(samples[index].image) for index in self.sampler.order(stream)[positions]]
        return files

    def on(self, device: torch.device | str, log_fn: Callable[[str], None] = print) -> Iterator[Step]:
        """The steps of the current epoch, on the device.

        Args:
            log_fn: gets a message for each replaced sample.

        Raises:
            WorkerDied: a worker was killed or hangs.
            UserError: a file cannot be read; see data.on_bad_sample.
        """
        device, statistics = torch.device(device), self.pairs.spec.statistics
        loader = self.loader(device.type == "cuda")
        for step in iterate(loader):
            if isinstance(step, UserError):
                kill_workers(loader)  # a loader freed through a traceback would wait 5 s for its workers
                raise UserError(str(step))  # without the worker's traceback
            self.count_bad(step.bad, log_fn)
            labeled, unlabeled = step.labeled.to(device, statistics), step.unlabeled
            labeled = LabeledBatch(labeled.image, labeled.mask.long())  # uint8 until here: an eighth of the bytes
            yield labeled, None if unlabeled is None else unlabeled.to(device, statistics)
        if self.bad:
            count = sum(self.bad.values())
            log_on_any_rank(log_fn, f"{count} samples replaced so far, because {len(self.bad)} files cannot be read")

    def loader(self, pin: bool) -> DataLoader:
        if pin not in self.loaders:
            self.pairs.open_cache()
            self.loaders[pin] = make_loader(
                self.pairs,
                self.num_workers,
                timeout=self.pairs.data.timeout,
                persistent_workers=self.num_workers > 0,
                pin_memory=pin,
                batch_sampler=self.sampler,
                collate_fn=collate,
            )
        return self.loaders[pin]

    def count_bad(self, bad: Sequence[str], log_fn: Callable[[str], None]) -> None:
        """Count replaced samples; log each file once."""
        for message in bad:
            if message not in self.bad:
                log_on_any_rank(log_fn, f"WARNING: sample replaced: {message}")
            self.bad[message] += 1


def log_on_any_rank(log_fn: Callable[[str], None], message: str) -> None:
    """Log on the main process; other ranks read other files and print to stderr."""
    if distributed.is_main():
        log_fn(message)
    else:
        print(f"rank {distributed.rank()}: {message}", file=sys.stderr)


def check_arguments(lists: Lists, views: Views, batch_size: int, epoch_of: str, world_size: int) -> None:
    """Raise UserError if no batch can be built."""
    for name in (views.labeled, *views.strong):
        if name not in PHOTOMETRIC:
            raise UserError(f"Views of the method: unknown view '{name}'; choose one of {', '.join(PHOTOMETRIC)}")
    if batch_size % world_size:
        raise UserError(f"batch_size: {batch_size} cannot be divided among {world_size} processes; use a multiple")
    if not lists.labeled:
        raise UserError(
            f"split {lists.name}: no labeled images; see data.split, data.labeled_id_path, data.custom.labeled_images"
        )
    if views.unlabeled and not lists.unlabeled:
        raise UserError(
            f"split {lists.name}: no unlabeled images, but this method needs them; "
            "see data.split, data.unlabeled_id_path, data.custom.unlabeled_images"
        )
    if epoch_of == "unlabeled" and not lists.unlabeled:
        raise UserError(f"split {lists.name}: no unlabeled images, of which an epoch is one pass; set epoch_of=labeled")
    length = len(lists.unlabeled if epoch_of == "unlabeled" else lists.labeled)
    if length < batch_size:
        raise UserError(
            f"split {lists.name}: {length} {epoch_of} images are fewer than one batch of {batch_size}; use a smaller "
            f"batch_size, a longer list or epoch_of={'labeled' if epoch_of == 'unlabeled' else 'unlabeled'}"
        )
