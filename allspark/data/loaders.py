"""The batches of training, on their way from files to the device.

A sample's randomness is a function of (seed, epoch, global position, stream) alone, never of a worker, a rank or what
came before: resuming is starting the sampler at a step, and one process or many draw the same samples.
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
from torch.utils.data import default_collate as stack  # into memory that a worker shares, where torch.stack is copied

from allspark import distributed
from allspark.config import DataConfig
from allspark.data.base import BadSample, DatasetSpec, Sample, to_tensor, worker_count
from allspark.data.batch import LabeledBatch, UnlabeledBatch, Views
from allspark.data.cache import Files, open_files
from allspark.data.splits import Lists
from allspark.data.transforms import OPERATIONS, PHOTOMETRIC, Geometry, cutmix_box, draw_geometry
from allspark.data.worker_pool import batches, end_workers, make_loader
from allspark.utils.errors import UserError

LABELED, UNLABELED = 0, 1  # streams of random numbers
IN_PLACE = 1_000_000  # of the stream that draws what stands in for a sample
REPLACEMENTS = 10  # in a row that may fail
Key = tuple[int, int, int, int]  # epoch, global position, labeled index, unlabeled index (-1: none)
Step = tuple[LabeledBatch, UnlabeledBatch | None]
Part = TypeVar("Part", LabeledBatch, UnlabeledBatch)


class Loaded(NamedTuple):
    """What a worker sends: a pair or, collated, a step; bad: why samples were replaced in it, one message for each."""

    labeled: LabeledBatch
    unlabeled: UnlabeledBatch | None
    bad: tuple[str, ...] = ()


class TrainPairs(Dataset):
    """One labeled and one unlabeled image as the method's views, by Key.

    A UserError is returned, not raised: raised in a worker it would arrive with the worker's traceback as its message.
    """

    def __init__(self, lists: Lists, spec: DatasetSpec, data: DataConfig, views: Views, seed: int) -> None:
        self.lists, self.spec, self.data, self.views, self.seed = lists, spec, data, views, seed
        self.files = Files(spec)

    def open_cache(self) -> None:
        """Read through data.cache from now on, where it names a folder; made first where need be."""
        unlabeled = self.lists.unlabeled if self.views.unlabeled else ()
        images = [sample.image for sample in (*self.lists.labeled, *unlabeled)]
        masks = [sample.mask for sample in self.lists.labeled]
        skip = self.data.on_bad_sample == "skip"
        self.files = open_files(self.data.cache, self.spec, images, masks, skip)

    def __getitem__(self, key: Key) -> Loaded | UserError:
        epoch, position, labeled, unlabeled = key
        bad: list[str] = []
        try:
            stream = (self.seed, epoch, position, LABELED)
            first = self.readable(self.labeled, self.lists.labeled, labeled, stream, bad)
            if not self.views.unlabeled:
                return Loaded(first, None, tuple(bad))
            stream = (self.seed, epoch, position, UNLABELED)
            return Loaded(
                first, self.readable(self.unlabeled, self.lists.unlabeled, unlabeled, stream, bad), tuple(bad)
            )
        except UserError as error:
            return error

    def readable(
        self,
        make: Callable[[Sample, tuple[int, ...]], Part],
        samples: Sequence[Sample],
        index: int,
        stream: tuple[int, ...],
        bad: list[str],
    ) -> Part:
        """make(samples[index]) or, by data.on_bad_sample=skip, of others that the stream draws until one is readable.

        Why the ones before it are not goes to `bad`. UserError after REPLACEMENTS, or where there is no other.
        """
        tried = 0
        for sample in stand_ins(samples, index, stream):
            try:
                return make(sample, stream)
            except BadSample as error:
                if self.data.on_bad_sample == "error":
                    raise UserError(f"{error}; or train without it: data.on_bad_sample=skip") from None
                bad.append(str(error))
                tried += 1
        raise UserError(f"{bad[-1]}; {tried} samples in a row cannot be read: is the storage gone, or a list wrong?")

    def geometry(self, image: np.ndarray, stream: tuple[int, ...]) -> Geometry:
        height, width = image.shape[:2]
        return draw_geometry(
            np.random.default_rng([*stream, 0]), width, height, self.data.crop_size, self.data.scale_range
        )

    def photometric(self, name: str, crop: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(3, crop, crop) uint8: with data.photometric_probability what the policy makes of the crop, else the crop."""
        probability = self.data.photometric_probability
        policy = PHOTOMETRIC[name if probability == 1 or rng.random() < probability else "weak"]
        return to_tensor(policy(crop, rng, OPERATIONS[self.data.photometric]))

    def labeled(self, sample: Sample, stream: tuple[int, ...]) -> LabeledBatch:
        """image (3, crop, crop) and mask (crop, crop), both uint8 on their way; not a batch yet."""
        image, mask = self.files.pair(sample)
        geometry = self.geometry(image, stream)
        view = self.photometric(self.views.labeled, geometry.image(image), np.random.default_rng([*stream, 1]))
        return LabeledBatch(view, torch.from_numpy(geometry.mask(mask, self.spec.ignore_index)))

    def unlabeled(self, sample: Sample, stream: tuple[int, ...]) -> UnlabeledBatch:
        """The views of one crop, (3, crop, crop) uint8 each, and its bool masks (crop, crop); not a batch yet."""
        image = self.files.image(sample.image)
        geometry = self.geometry(image, stream)
        crop = geometry.image(image)
        strong, cutmix = [], []
        for number, name in enumerate(self.views.strong, start=1):
            rng = np.random.default_rng([*stream, number])
            strong.append(self.photometric(name, crop, rng))
            cutmix.append(torch.from_numpy(cutmix_box(rng, self.data.crop_size, self.views.cutmix)))
        return UnlabeledBatch(to_tensor(crop), tuple(strong), torch.from_numpy(geometry.valid()), tuple(cutmix))


def stand_ins(samples: Sequence[Sample], index: int, stream: tuple[int, ...]) -> Iterator[Sample]:
    """The sample itself, then at most REPLACEMENTS different others, by the stream alone."""
    yield samples[index]
    order = np.random.default_rng([*stream, IN_PLACE]).permutation(len(samples))
    for other in order[order != index][:REPLACEMENTS]:
        yield samples[other]


def collate(items: Sequence[Loaded | UserError]) -> Loaded | UserError:
    """Stack the items of a step; one that could not be made stands for all of them."""
    for item in items:
        if isinstance(item, UserError):
            return item
    labeled, unlabeled = [item.labeled for item in items], [item.unlabeled for item in items]
    bad = tuple(message for item in items for message in item.bad)
    batch = LabeledBatch(stack([one.image for one in labeled]), stack([one.mask for one in labeled]))
    if unlabeled[0] is None:
        return Loaded(batch, None, bad)
    views = UnlabeledBatch(
        stack([one.weak for one in unlabeled]),
        tuple(stack(views) for views in zip(*(one.strong for one in unlabeled), strict=True)),
        stack([one.valid for one in unlabeled]),
        tuple(stack(boxes) for boxes in zip(*(one.cutmix for one in unlabeled), strict=True)),
    )
    return Loaded(batch, views, bad)


class StepSampler(Sampler):
    """The keys of each step of one epoch, for one rank: step s covers positions [s B, (s + 1) B), a rank B / P of them.

    The list that makes the epoch (`primary`) is permuted anew each epoch and its last len % B places are dropped; the
    other one runs on through permutations of its own, over the ends of epochs, so that its images come equally often.
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
        epoch = self.epoch  # as it was when this pass began
        labeled, unlabeled = (self.order(stream) for stream in (LABELED, UNLABELED))
        for step in range(self.start_step, self.steps):
            first = step * self.batch_size + self.first
            positions = range(first, first + self.share)
            yield [(epoch, position, int(labeled[position]), int(unlabeled[position])) for position in positions]

    def order(self, stream: int) -> np.ndarray:
        """The index of each position of this epoch, (steps * B,) integers; -1 where the list is not used."""
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
    """Epochs of (LabeledBatch, UnlabeledBatch | None) for one rank; batch_size counts labeled images over all ranks."""

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
        check_request(lists, views, batch_size, epoch_of, world_size)
        # An epoch may be counted by an unlabeled list that is not read: supervised then runs as long as the others
        primary = UNLABELED if epoch_of == "unlabeled" else LABELED
        sizes = (len(lists.labeled), len(lists.unlabeled))
        self.sampler = StepSampler(sizes, primary, batch_size, seed, rank, world_size)
        self.pairs = TrainPairs(lists, spec, data, views, seed)
        self.num_workers = worker_count(data.num_workers)
        self.loaders: dict[bool, DataLoader] = {}  # by pin_memory, made when first used
        self.bad: Counter[str] = Counter()  # why a sample was replaced -> how often, since this process began

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next `on` begins at this step of this epoch."""
        self.sampler.epoch, self.sampler.start_step = epoch, start_step

    def images(self, step: int) -> list[str]:
        """The files of this step, from 0, of the epoch that set_epoch chose: labeled, then unlabeled, of all ranks."""
        places = slice(step * self.sampler.batch_size, (step + 1) * self.sampler.batch_size)
        lists, files = self.pairs.lists, []
        for stream, samples in ((LABELED, lists.labeled), (UNLABELED, lists.unlabeled)):
            if stream == LABELED or self.pairs.views.unlabeled:
                files += [str(samples[index].image) for index in self.sampler.order(stream)[places]]
        return files

    def on(self, device: torch.device | str, tell: Callable[[str], None] = print) -> Iterator[Step]:
        """The steps of the epoch that set_epoch chose, on the device; `tell` hears of replaced samples.

        WorkerDied: a worker was killed or hangs; UserError: a file cannot be read, see data.on_bad_sample.
        """
        device = torch.device(device)
        loader = self.loader(device.type == "cuda")
        for step in batches(loader):
            if isinstance(step, UserError):
                end_workers(loader)  # who frees a loader in a cycle with a traceback waits for its workers in vain, 5 s
                raise UserError(str(step))  # with nothing but its message
            self.note(step.bad, tell)
            labeled, unlabeled = step.labeled.to(device), step.unlabeled
            labeled = LabeledBatch(labeled.image, labeled.mask.long())  # an eighth of the bytes until here
            yield labeled, None if unlabeled is None else unlabeled.to(device)
        if self.bad:
            count = sum(self.bad.values())
            tell_all(tell, f"{count} samples were replaced so far, of {len(self.bad)} that cannot be read")

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

    def note(self, bad: Sequence[str], tell: Callable[[str], None]) -> None:
        """Count; a file is named when it is met first."""
        for message in bad:
            if message not in self.bad:
                tell_all(tell, f"WARNING: another sample is taken: {message}")
            self.bad[message] += 1


def tell_all(tell: Callable[[str], None], message: str) -> None:
    """`tell` is the main process' log; another one that reads other files says it on stderr."""
    if distributed.is_main():
        tell(message)
    else:
        print(f"process {distributed.rank()}: {message}", file=sys.stderr)


def check_request(lists: Lists, views: Views, batch_size: int, epoch_of: str, world_size: int) -> None:
    """UserError for what no batch can be made of."""
    for name in (views.labeled, *views.strong):
        if name not in PHOTOMETRIC:
            raise UserError(f"views: there is no photometric policy '{name}'; there are {', '.join(PHOTOMETRIC)}")
    if batch_size % world_size:
        raise UserError(
            f"batch_size: {batch_size} images do not divide among {world_size} processes; give a multiple of it"
        )
    if not lists.labeled:
        raise UserError(
            f"split {lists.name}: no labeled images; see data.split, data.labeled_id_path, data.custom.labeled_images"
        )
    if views.unlabeled and not lists.unlabeled:
        raise UserError(
            f"split {lists.name}: no unlabeled images, and this method learns from them; "
            "see data.split, data.unlabeled_id_path, data.custom.unlabeled_images"
        )
    length = len(lists.unlabeled if epoch_of == "unlabeled" else lists.labeled)
    if length < batch_size:
        raise UserError(
            f"split {lists.name}: its {length} {epoch_of} images make no step of batch_size {batch_size}; give a "
            f"smaller batch_size, a longer list or epoch_of={'labeled' if epoch_of == 'unlabeled' else 'unlabeled'}"
        )
