"""python -m allspark predict: images in; masks of class indices, and pictures of them, out."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from allspark.cli import loading
from allspark.data.base import Sample, read_image, to_tensor
from allspark.data.splits import IMAGE_SUFFIXES, Entry, check_files, read_entries
from allspark.distributed import choose_device
from allspark.errors import UserError
from allspark.evaluation.evaluate import check_size, equal_sizes, predict_with_confidence
from allspark.evaluation.outputs import PredictionFolder, unique_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    loading.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where <name>.png goes: class indices")
    parser.add_argument("--index-only", action="store_true", help="without _color, _overlay and _confidence.png")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where the paths of a list start; default: beside it"
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image, folder (with all below it), quoted glob, .txt list of images"
    )


def main(args: argparse.Namespace) -> None:
    images = find_images(args.paths, args.out, args.data_root)
    device = choose_device(args.device)
    loaded = loading.load_for_inference(args.checkpoint, device, args.dataset)
    inference = loaded.inference(args.mode, scales=args.scales, flip=args.flip)
    folder = PredictionFolder(args.out, loaded.spec.palette, index_only=args.index_only, confidence=True)
    named = dict(zip(images, unique_names(images), strict=True))
    folder.prepare(list(named.values()), images)
    unreadable: dict[Path, UserError] = {}
    for image, names in batches(named, args.batch_size, unreadable):
        with loading.computing(args, device):
            masks, prob = predict_with_confidence(loaded.model, image, loaded.spec, device, inference, names)
        for name, *tensors in zip(names, image, masks.cpu(), prob.cpu(), strict=True):
            folder.write(name, *tensors)
    print(f"{len(images) - len(unreadable)} of {len(images)} images predicted: {args.out}")
    if unreadable:
        first, *others = unreadable.values()
        more = f" (and {len(others)} more: {', '.join(map(str, list(unreadable)[1:6]))})" if others else ""
        raise UserError(f"{first}{more}")


def batches(named: dict[Path, str], size: int, unreadable: dict[Path, UserError]) -> Iterator[tuple[Tensor, list[str]]]:
    """Images (B, 3, H, W) uint8 of equal size with their names, read `size` files at a time, and no more held.

    A file that cannot be predicted is left out, and the reason put into `unreadable`.
    """
    files = list(named.items())
    with tqdm(total=len(files), desc="predict", unit="image", leave=False, disable=None) as bar:
        for first in range(0, len(files), size):
            items = []
            for path, name in files[first : first + size]:
                try:
                    items.append((read(path), name))
                except UserError as error:
                    unreadable[path] = error
            for (image,), names in equal_sizes(items):
                yield image, names
            bar.update(min(size, len(files) - first))


def read(path: Path) -> Tensor:
    """(3, H, W) uint8; UserError where the file is no image or too small."""
    image = to_tensor(read_image(path))
    check_size(image, path)
    return image


def find_images(words: list[str], out: Path, data_root: Path | None) -> list[Path]:
    """The images that the words mean, each once, in their order; earlier predictions below `out` are none of them."""
    found: dict[Path, Path] = {}
    for word in words:
        for image in images_of(word, out.resolve(), data_root):
            found.setdefault(image.resolve(), image)
    return list(found.values())


def images_of(word: str, out: Path, data_root: Path | None) -> list[Path]:
    path = Path(os.path.expanduser(word))
    if path.is_file():
        return listed(path, data_root) if path.suffix.lower() == ".txt" else [path]
    if path.is_dir():
        files = (file for file in path.rglob("*") if not hidden(file.relative_to(path)))
    elif any(sign in word for sign in "*?["):
        files = (Path(match) for match in glob.glob(str(path), recursive=True))
    else:
        raise UserError(f"{word}: no such image, folder or list; correct the path")
    images = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and out not in f.resolve().parents and f.is_file()]
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{word}: no images there ({kinds}; what lies below --out does not count); correct the path")
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
