"""allspark predict: masks of class indices, and pictures of them, for images and videos."""

from __future__ import annotations

import argparse
import csv
import glob
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from allspark import inference as loading
from allspark.data.entries import IMAGE_SUFFIXES, Entry, image_files, read_entries
from allspark.data.image_io import load_image
from allspark.data.spec import DEFAULT_READING, ImageReading, Sample
from allspark.data.splits import check_files, describe_others
from allspark.data.transforms import to_tensor
from allspark.device import choose_device
from allspark.evaluation.dataset import group_by_size
from allspark.evaluation.evaluate import predict_with_confidence
from allspark.evaluation.sliding_window import Inference, check_size
from allspark.memory_estimate import GB, FakeMemoryCounter, free_memory
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.visualization.pictures import is_own_file
from allspark.visualization.prediction_writer import PredictionWriter, overlay_in_bands, real_path, unique_names
from allspark.visualization.video import VIDEO_SUFFIXES, frame_count, frame_rate, is_video, read_frames, write_video

LARGE = 4_000_000  # pixels; larger images are checked to fit into memory, half a second per size
Check = Callable[[Tensor, Path], None]  # (3, H, W) and its file; UserError if it cannot be predicted


def main(args: argparse.Namespace) -> None:
    found = find_images(args.paths, args.out, args.data_root)
    device = choose_device(args.device)
    loaded = loading.load_for_inference(args.checkpoint, device, args.dataset, args.best)
    inference = loaded.inference(args.mode, windows=args.windows, scales=args.scales, flip=args.flip)
    palette = loaded.spec.palette
    folder = PredictionWriter(args.out, palette, kinds=args.what, classes=loaded.spec.classes)
    named = dict(zip(found, unique_names(found), strict=True))
    images = {path: name for path, name in named.items() if not is_video(path)}
    videos = {path: name for path, name in named.items() if is_video(path)}
    folder.prepare(list(images.values()), list(images), videos={} if args.video else videos)
    clips = {path: args.out / f"{name}.mp4" for path, name in videos.items()} if args.video else {}
    check_new([*clips.values(), *([args.shares] if args.shares is not None else [])])
    unreadable: dict[Path, UserError] = {}
    shares: list[list[object]] = []  # a row for each prediction: its name, percent of each class
    check, reading = memory_check(loaded.model, inference, device), loaded.spec.reading

    def predictions(files: Mapping[Path, str]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        for batch, names in batches(files, args.batch_size, unreadable, args.every, check, reading):
            with loading.precision_context(args.precision, device):
                masks, prob = predict_with_confidence(loaded.model, batch, loaded.spec, device, inference, names)
            for name, image, mask, confidence in zip(names, batch, masks.cpu(), prob.cpu(), strict=True):
                counts = torch.bincount(mask.flatten(), minlength=256)[: loaded.spec.num_classes]
                shares.append([name, *(f"{share:.4f}" for share in (100 * counts / counts.sum()).tolist())])
                yield name, image, mask, confidence

    for path, clip in clips.items():
        frames = (overlay_in_bands(image, mask, palette) for _, image, mask, _ in predictions({path: named[path]}))
        write_video(clip, frames, frame_rate(path) / args.every)
        folder.write_legend()
    for prediction in predictions(images if clips else named):
        folder.write(*prediction)
    if args.shares is not None:
        order = {name: number for number, name in enumerate(named.values())}  # a batch has images of one size
        shares.sort(key=lambda row: order.get(row[0], order.get(str(row[0]).rpartition("/")[0], 0)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["image", *loaded.spec.classes], *shares])
        write_text(args.shares, text.getvalue(), "free disk space or choose another --shares")
    num_images = sum(path not in unreadable for path in images)
    counts = [f"{num_images} of {len(images)} images"] if images or not videos else []
    counts += [f"{len(shares) - num_images} frames of {len(videos)} video(s)"] if videos else []
    print(f"{' and '.join(counts)} predicted: {args.out}")
    if unreadable:
        first, *others = unreadable.values()
        for error in others:
            print(f"left out: {error}", file=sys.stderr)
        raise UserError(f"{first}{f' (and {len(others)} more, above)' if others else ''}")


def check_new(paths: Sequence[Path]) -> None:
    """UserError if one of the files exists: unlike a picture, it cannot be recognized as one of this program's."""
    for path in paths:
        if os.path.lexists(path):
            raise UserError(f"{path}: already exists; move it away or choose another name")


def batches(
    named: Mapping[Path, str],
    size: int,
    unreadable: dict[Path, UserError],
    every: int = 1,
    check: Check = lambda image, path: None,
    reading: ImageReading = DEFAULT_READING,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Read images in batches of equal size.

    Args:
        named: file -> name of its prediction.
        size: files read at a time, at most so many are in memory.
        unreadable: receives file -> reason for files that cannot be predicted; they are left out.
        every: of a video, each N-th frame is read.
        check: raises UserError for an image that cannot be predicted.
        reading: how image files are read.

    Yields:
        (B, 3, H, W) uint8, and B names.
    """
    expected = sum(-(-frame_count(path) // every) if is_video(path) else 1 for path in named)
    items = read_each(named, unreadable, every, check, reading)
    with tqdm(total=expected, desc="predict", unit="image", leave=False, disable=None) as bar:
        while chunk := list(itertools.islice(items, size)):
            for (image,), names in group_by_size(chunk):
                yield image, names
            bar.update(len(chunk))


def read_each(
    named: Mapping[Path, str], unreadable: dict[Path, UserError], every: int, check: Check, reading: ImageReading
) -> Iterator[tuple[Tensor, str]]:
    """Yield (3, H, W) uint8 and the name of its prediction, for each image and each frame of a video."""
    warned, white = False, reading.image_max
    for path, name in named.items():
        try:
            if is_video(path):
                for number, frame in read_frames(path, every):
                    frame = to_channels(frame, path, reading.channels)
                    yield to_checked_tensor(frame, path, check), f"{name}/{number:06d}"
            else:
                image = load_image(path, reading)
                peak, reason = image.peak or 0, ""
                if white is None and 0 < peak < 2**15:
                    reason = (
                        f"16 bits per channel but no value above {peak}; the checkpoint's recipe does not say which "
                        "value is white (data.custom.image_max), so 65535 is"
                    )
                elif white is not None and peak > white:
                    reason = (
                        f"values up to {peak}; all above {white}, the data.custom.image_max of the training, become "
                        "white. Save it with the range of the training images"
                    )
                if reason and not warned:
                    warned = True
                    print(f"WARNING: {path}: {reason}", file=sys.stderr)
                yield to_checked_tensor(image.pixels, path, check), name
        except UserError as error:
            unreadable[path] = error


def to_channels(frame: np.ndarray, path: Path, channels: int) -> np.ndarray:
    """A frame (H, W, 3) as the model takes it: in RGB, or gray if it has one channel."""
    if channels not in (1, 3):
        raise UserError(f"{path}: a video has 3 channels, the model takes {channels}; predict images of that kind")
    return frame if channels == 3 else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)[..., None]


def to_checked_tensor(image: np.ndarray, path: Path, check: Check) -> Tensor:
    """(H, W, C) array -> (C, H, W) tensor; UserError from `check`."""
    tensor = to_tensor(image)
    check(tensor, path)
    return tensor


def memory_check(model: nn.Module, inference: Inference, device: torch.device) -> Check:
    """A check that an image is not too small and, if it is predicted as a whole, fits into memory."""
    peaks: dict[torch.Size, int] = {}

    def check(image: Tensor, path: Path) -> None:
        check_size(image, path, inference)
        height, width = image.shape[-2:]
        if inference.mode != "whole" or height * width < LARGE:
            return
        if image.shape not in peaks:
            peaks[image.shape] = forward_peak(model, image.shape, max(1.0, *inference.scales), device)
        free = free_memory(device.type)
        if free is not None and peaks[image.shape] > free:
            raise UserError(
                f"{path}: {width} x {height} pixels need {peaks[image.shape] / GB:.1f} GB as a whole, this "
                f"{device.type} has {free / GB:.1f} GB; --mode sliding_window predicts it in parts"
            )

    return check


def forward_peak(model: nn.Module, shape: torch.Size, scale: float, device: torch.device) -> int:
    """Peak memory of a forward pass in bytes, from a pass on fake tensors."""
    channels, height, width = shape
    ledger = FakeMemoryCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger:
        scores = model(torch.empty((1, channels, round(height * scale), round(width * scale)), device=device)).logits
        del scores
    return ledger.peak


def find_images(arguments: list[str], out: Path, data_root: Path | None) -> list[Path]:
    """The images and videos named by the PATH arguments, each once and in order, without those below `out`."""
    found: dict[Path, Path] = {}
    for argument in arguments:
        for image in expand(argument, real_path(out), data_root):
            if image.is_symlink():
                found.setdefault(real_path(image), image)
            else:  # a file takes precedence over links to it
                found[real_path(image)] = image
    return list(found.values())


def expand(argument: str, out: Path, data_root: Path | None) -> list[Path]:
    """The images and videos of a file, list, folder or glob."""
    path = Path(os.path.expanduser(argument))
    if not argument.strip():
        raise UserError("a PATH is empty; check for an unset shell variable, or write . for the current folder")
    if path.is_file():
        return read_list(path, data_root) if path.suffix.lower() == ".txt" else [path]
    suffixes = IMAGE_SUFFIXES
    if path.is_dir():  # without videos, which folders of photos often contain unnoticed
        files, others = image_files(path)
        if others := [file for file in others if out not in real_path(file).parents]:
            print(f"WARNING: {describe_others(path, others)}", file=sys.stderr)
    elif any(character in argument for character in "*?["):
        files = (Path(match) for match in glob.glob(str(path), recursive=True))
        suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    else:
        raise UserError(f"{argument}: no such image, folder or list; correct the path, and quote it if it has blanks")
    named = (file for file in files if file.suffix.lower() in suffixes and out not in real_path(file).parents)
    images = [file for file in named if file.is_file() or not file.exists()]  # a broken link is an error later
    if own := {file for file in images if file.suffix == ".png" and is_own_file(file)}:
        print(f"WARNING: {argument}: {len(own)} pictures of this program are left out", file=sys.stderr)
        images = [file for file in images if file not in own]
    if not images:
        kinds = ", ".join(sorted(suffixes))
        raise UserError(
            f"{argument}: no images found ({kinds}; not below --out); correct the path, or give the path of a video "
            "itself"
        )
    return sorted(images)


def read_list(path: Path, data_root: Path | None) -> list[Path]:
    """The first column of a list; relative paths start at data_root, by default the folder of the list."""
    entries = [
        Entry(Sample(entry.sample.image), entry.source) for entry in read_entries(path, data_root or path.parent)
    ]
    if not entries:
        raise UserError(f"{path}: this list is empty; write an image per line")
    try:
        check_files(entries)
    except UserError as error:
        raise UserError(f"{error}: without --data-root, paths start at the folder of the list") from None
    return [entry.sample.image for entry in entries]
