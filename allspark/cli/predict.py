"""python -m allspark predict: images in; masks of class indices, and pictures of them, out."""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from allspark import inference as loading
from allspark.data.base import Sample, all_below, read_image, to_tensor
from allspark.data.splits import IMAGE_SUFFIXES, Entry, check_files, read_entries
from allspark.distributed import choose_device
from allspark.evaluation.evaluate import check_size, equal_sizes, predict_with_confidence
from allspark.evaluation.sliding_window import Inference
from allspark.memory_estimate import GB, Hollow, room
from allspark.utils.errors import UserError
from allspark.visualization.prediction_writer import PredictionFolder, real, unique_names
from allspark.visualization.video import VIDEO_SUFFIXES, frame_count, frames, is_video

LARGE = 4_000_000  # pixels, from which on it is asked whether an image fits into memory: half a second for each size
Check = Callable[[Tensor, Path], None]  # image (3, H, W), its file: UserError where it cannot be predicted


def main(args: argparse.Namespace) -> None:
    found = find_images(args.paths, args.out, args.data_root)
    device = choose_device(args.device)
    loaded = loading.load_for_inference(args.checkpoint, device, args.dataset)
    inference = loaded.inference(args.mode, scales=args.scales, flip=args.flip)
    folder = PredictionFolder(args.out, loaded.spec.palette, index_only=args.index_only, confidence=True)
    named = dict(zip(found, unique_names(found), strict=True))
    images = [path for path in found if not is_video(path)]
    videos = {path: name for path, name in named.items() if is_video(path)}
    folder.prepare([named[path] for path in images], images, videos=videos)
    unreadable: dict[Path, UserError] = {}
    predicted = 0
    check = fitting(loaded.model, inference, device)
    for image, names in batches(named, args.batch_size, unreadable, args.every, check):
        with loading.computing(args, device):
            masks, prob = predict_with_confidence(loaded.model, image, loaded.spec, device, inference, names)
        for name, *tensors in zip(names, image, masks.cpu(), prob.cpu(), strict=True):
            folder.write(name, *tensors)
        predicted += len(names)
    still = sum(path not in unreadable for path in images)
    told = [f"{still} of {len(images)} images"] if images or not videos else []
    told += [f"{predicted - still} frames of {len(videos)} video(s)"] if videos else []
    print(f"{' and '.join(told)} predicted: {args.out}")
    if unreadable:
        first, *others = unreadable.values()
        for error in others:
            print(f"left out: {error}", file=sys.stderr)
        raise UserError(f"{first}{f' (and {len(others)} more, above)' if others else ''}")


def batches(
    named: Mapping[Path, str],
    size: int,
    unreadable: dict[Path, UserError],
    every: int = 1,
    check: Check = check_size,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Images (B, 3, H, W) uint8 of equal size with their names, read `size` at a time, and no more held.

    A file that cannot be predicted is left out, and the reason put into `unreadable`.
    """
    expected = sum(-(-frame_count(path) // every) if is_video(path) else 1 for path in named)
    items = read_each(named, unreadable, every, check)
    with tqdm(total=expected, desc="predict", unit="image", leave=False, disable=None) as bar:
        while chunk := list(itertools.islice(items, size)):
            for (image,), names in equal_sizes(chunk):
                yield image, names
            bar.update(len(chunk))


def read_each(
    named: Mapping[Path, str], unreadable: dict[Path, UserError], every: int, check: Check
) -> Iterator[tuple[Tensor, str]]:
    """(3, H, W) uint8 and the name of its prediction, for each image, and for the frames of each video."""
    for path, name in named.items():
        try:
            if is_video(path):
                for number, frame in frames(path, every):
                    yield checked(frame, path, check), f"{name}/{number:06d}"
            else:
                yield checked(read_image(path), path, check), name
        except UserError as error:
            unreadable[path] = error


def checked(image: np.ndarray, path: Path, check: Check) -> Tensor:
    """(H, W, 3) -> (3, H, W)."""
    tensor = to_tensor(image)
    check(tensor, path)
    return tensor


def fitting(model: nn.Module, inference: Inference, device: torch.device) -> Check:
    """A check of an image's size: not too small, and as a whole not too large for the memory that is there."""
    known: dict[torch.Size, int] = {}

    def check(image: Tensor, path: Path) -> None:
        check_size(image, path)
        height, width = image.shape[-2:]
        if inference.mode != "whole" or height * width < LARGE:
            return
        if image.shape not in known:
            known[image.shape] = whole_pass(model, image.shape, max(1.0, *inference.scales), device)
        there = room(device.type)
        if there is not None and known[image.shape] > there:
            raise UserError(
                f"{path}: {width} x {height} pixels; as a whole they take {known[image.shape] / GB:.1f} GB, this "
                f"{device.type} has {there / GB:.1f} GB: --mode sliding_window takes a part of it at a time"
            )

    return check


def whole_pass(model: nn.Module, shape: torch.Size, scale: float, device: torch.device) -> int:
    """Bytes of the tensors of a forward pass at their most, by one on tensors without content."""
    _, height, width = shape
    ledger = Hollow()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger:
        scores = model(torch.empty((1, 3, round(height * scale), round(width * scale)), device=device)).logits
        del scores
    return ledger.peak


def find_images(words: list[str], out: Path, data_root: Path | None) -> list[Path]:
    """The images and videos that the words mean, each once, in their order; nothing below `out` is one of them."""
    found: dict[Path, Path] = {}
    for word in words:
        for image in images_of(word, real(out), data_root):
            if image.is_symlink():
                found.setdefault(real(image), image)
            else:  # its own name goes before a link's
                found[real(image)] = image
    return list(found.values())


def images_of(word: str, out: Path, data_root: Path | None) -> list[Path]:
    path = Path(os.path.expanduser(word))
    if not word.strip():
        raise UserError("an empty name among the images; a shell variable without a value? The current folder is .")
    if path.is_file():
        return listed(path, data_root) if path.suffix.lower() == ".txt" else [path]
    suffixes = IMAGE_SUFFIXES
    if path.is_dir():  # videos in it are asked for by name or glob: a folder of photos has some that nobody thinks of
        files = (file for file in all_below(path) if not hidden(file.relative_to(path)))
    elif any(sign in word for sign in "*?["):
        files = (Path(match) for match in glob.glob(str(path), recursive=True))
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    else:
        raise UserError(f"{word}: no such image, folder or list; correct the path")
    named = (file for file in files if file.suffix.lower() in suffixes and out not in real(file).parents)
    images = [file for file in named if file.is_file() or not file.exists()]  # a link to nothing is told
    if not images:
        kinds = ", ".join(sorted(suffixes))
        raise UserError(
            f"{word}: no images there ({kinds}; what lies below --out does not count); correct the path, or name a "
            "video itself"
        )
    return sorted(images)


def hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def listed(path: Path, data_root: Path | None) -> list[Path]:
    """The first column of a list; its files lie below data_root, or beside the list, if they are not absolute."""
    entries = [
        Entry(Sample(entry.sample.image), entry.source) for entry in read_entries(path, data_root or path.parent)
    ]
    if not entries:
        raise UserError(f"{path}: this list names no image; write one per line")
    try:
        check_files(entries)
    except UserError as error:
        raise UserError(f"{error}: without --data-root, paths in a list start from its own folder") from None
    return [entry.sample.image for entry in entries]
