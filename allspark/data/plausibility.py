"""Doubts about lists that are valid: val frames beside training frames, masks of other images, too few steps."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from allspark.data.image_io import read_image
from allspark.data.mask_io import read_pair
from allspark.data.spec import DatasetSpec, Sample
from allspark.data.splits import Lists
from allspark.utils.errors import UserError

FRAMES = 30  # frames of a video that lie nearer show nearly the same
OPENED = 24  # images that are compared
SIDE = 128  # pixels that images are scaled to, to find their edges
FEW_STEPS = 100


def doubts(lists: Lists, spec: DatasetSpec) -> list[str]:
    """Warnings about the lists of a run; images that cannot be read are left out."""
    return [*neighboring_frames(lists, spec), *mismatched_masks(lists.labeled, spec)]


def few_steps(lists: Lists, epoch_of: str, epochs: int, steps: int, batch_size: int) -> list[str]:
    """A warning if a run of so many steps per epoch has few steps in all, or never uses some labeled images."""
    total, unused = steps * epochs, len(lists.labeled) - steps * epochs * batch_size
    if total >= FEW_STEPS and unused <= 0:
        return []
    length = len(getattr(lists, epoch_of)) or len(lists.labeled)
    never = f"; {unused} of {len(lists.labeled)} labeled images are never used" if unused > 0 else ""
    other = " or set epoch_of=labeled" if epoch_of == "unlabeled" and len(lists.labeled) > length else ""
    return [f"only {total} steps in all, {epochs} passes over {length} {epoch_of} images{never}: raise epochs{other}"]


def neighboring_frames(lists: Lists, spec: DatasetSpec) -> list[str]:
    """A warning if val images are frames of videos of which training images are frames, too.

    They are if their numbers are near, and if images with near numbers look more alike than others do. A video is
    first looked for in one folder, then in folders of one name (train/a and val/a), then in any (train and val).
    """
    for folder_of in (lambda folder: folder, lambda folder: folder.name, lambda folder: None):
        pairs = pair_frames(lists, folder_of)
        if len(pairs) >= max(6, len(lists.val) / 10) and look_alike(pairs, spec):
            image, neighbor = (sample.image for sample in pairs[0])
            return [
                f"{len(pairs)} of {len(lists.val)} val images seem to be frames within {FRAMES} frames of a training "
                f"image, such as {image} and {neighbor}: the score is too good. Draw whole videos for evaluation: "
                "splits make --val SIZE --group REGEX"
            ]
    return []


def pair_frames(lists: Lists, folder_of: Callable[[Path], Any]) -> list[tuple[Sample, Sample]]:
    """Val images, each with the training image of the nearest number if it is near.

    Args:
        lists: of the run.
        folder_of: folder of an image -> what is equal for the folders of a video.
    """
    videos: dict[Any, list[tuple[int, Sample]]] = defaultdict(list)
    val = {sample.image for sample in lists.val}  # an image in two lists is reported as such
    for sample in (*lists.labeled, *lists.unlabeled):
        if sample.image not in val and (place := frame_number(sample.image, folder_of)) is not None:
            videos[place[0]].append((place[1], sample))
    for frames in videos.values():
        frames.sort(key=itemgetter(0))
    pairs = []
    for sample in lists.val:
        video, number = frame_number(sample.image, folder_of) or (None, 0)
        frames = videos.get(video, [])
        index = bisect_left(frames, number, key=itemgetter(0))
        around = [(abs(other - number), neighbor) for other, neighbor in frames[max(index - 1, 0) : index + 1]]
        if around and (nearest := min(around, key=itemgetter(0)))[0] <= FRAMES:
            pairs.append((sample, nearest[1]))
    return pairs


def frame_number(image: Path, folder_of: Callable[[Path], Any]) -> tuple[tuple[Any, str, str], int] | None:
    """The video of a frame (folder, name before and after the last number) and its number; None without a number."""
    found = re.fullmatch(r"(.*?)(\d{1,18})(\D*)", image.stem)
    return found and ((folder_of(image.parent), found[1], found[3]), int(found[2]))


def look_alike(pairs: Sequence[tuple[Sample, Sample]], spec: DatasetSpec) -> bool:
    """Whether the images of a pair differ less than images of different pairs."""
    some = pairs[:: -(-len(pairs) // OPENED)]
    read = [small for pair in some if len(small := read_each(pair, lambda s: tiny_image(s, spec))) == 2]
    if len(read) < 6:
        return False
    first, second = map(np.array, zip(*read, strict=True))
    others = [np.abs(first - np.roll(second, shift, axis=0)).mean() for shift in range(1, len(second))]
    return np.abs(first - second).mean() <= 0.6 * np.median(others)


def tiny_image(sample: Sample, spec: DatasetSpec) -> np.ndarray:
    """16 x 16 pixels of the first three bands."""
    return shrink(read_image(sample.image, spec.reading), 16)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The first three bands (H, W, C) uint8 at side x side, float32; OpenCV cannot average more than four."""
    return cv2.resize(image[..., :3], (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)


def mismatched_masks(labeled: Sequence[Sample], spec: DatasetSpec) -> list[str]:
    """A warning if the borders of masks lie on edges of their images no more than on those of other images."""
    samples = sorted(labeled, key=lambda sample: sample.image)[:OPENED]  # neighbors: a list may be shifted by one
    read = read_each(samples, lambda sample: edges_and_borders(sample, spec))
    if len(read) < 8:
        return []
    edges, borders = zip(*read, strict=True)
    table = np.array([[edge[border].mean() for edge in edges] for border in borders])  # (mask, image)
    own = table.diagonal()
    first, last = samples[0].image, samples[-1].image
    for shift in (1, -1):
        other = np.diagonal(table, shift)
        if t_value(other - (own[:-1] if shift == 1 else own[1:])) > 4:
            place = "next" if shift == 1 else "previous"
            return [
                f"masks of {first} to {last} fit the edges of the {place} image better than those of their own: is "
                "the list of masks shifted by one?"
            ]
    rest = (table.sum(1) - own) / (len(own) - 1)
    if t_value(own - rest) > 2:
        return []
    return [
        f"the borders in the masks of {first} to {last} lie on edges of their images no more than on edges of the "
        f"other images ({own.mean():.2f} and {rest.mean():.2f} of the mean gradient): do masks belong to their images?"
    ]


def edges_and_borders(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Of a sample at SIDE x SIDE: gradient of the image relative to its mean, and where the mask changes (bool).

    Raises:
        UserError: unreadable, or the image or the mask has one value everywhere.
    """
    image, mask = read_pair(sample, spec)
    image = cv2.GaussianBlur(shrink(image, SIDE), (0, 0), 1)
    gradient = np.hypot(cv2.Sobel(image, cv2.CV_32F, 1, 0), cv2.Sobel(image, cv2.CV_32F, 0, 1))
    gradient = gradient.reshape(SIDE, SIDE, -1).sum(2)
    mask = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    inner = (slice(1, -1), slice(1, -1))  # of the frame, where padding makes edges
    border = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            border[inner] |= (mask != np.roll(mask, step, axis))[inner]
    if not border.any() or not gradient.any():
        raise UserError(f"{sample.image}: nothing to compare")
    return gradient / gradient.mean(), border


def t_value(differences: np.ndarray) -> float:
    """Mean of the differences in units of its standard error."""
    return float(differences.mean() / max(differences.std(ddof=1) / np.sqrt(len(differences)), 1e-9))


def read_each(samples: Sequence[Sample], read: Callable[[Sample], Any]) -> list[Any]:
    """What `read` makes of the samples that can be read."""
    results = []
    for sample in samples:
        with contextlib.suppress(UserError):  # reported with all unreadable files
            results.append(read(sample))
    return results
