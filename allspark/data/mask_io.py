"""Reading masks: what the values of a file mean, and which of them are classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from allspark.data.image_files import (
    INTERPRETATION,
    BadSample,
    open_image,
    orientation_of,
    raw_mode,
    read_size,
    retried,
)
from allspark.data.image_io import read_image, turn
from allspark.data.spec import ColorTable, DatasetSpec, Sample, pack_color
from allspark.utils.errors import abbreviate


class MaskFile(NamedTuple):
    """A mask, and what its file says about it.

    Args:
        values: (H, W) stored values, uint8 unless they need more; colors 0xRRGGBB, int32, if `colored`.
        mode: of the file, in Pillow's terms, such as RGB.
        colored: whether the values are colors.
        bits: bits per pixel of a gray mask, 8 for others.
        palette: colors 0xRRGGBB of the palette whose indices `values` are; () without one.
        orientation: the EXIF orientation.
        transparent: whether some pixels are transparent.
    """

    values: np.ndarray
    mode: str
    colored: bool = False
    bits: int = 8
    palette: tuple[int, ...] = ()
    orientation: int = 1
    transparent: bool = False


def load_mask(path: Path, spec: DatasetSpec) -> MaskFile:
    """Read a mask's values as stored: colors if spec.colors is set or the file has colors, else values.

    Of a palette, a gray entry counts as its gray value; the indices of other palettes are the values.

    Raises:
        BadSample: the file is damaged, or of a format that does not keep the values.
    """
    return retried(partial(decode_mask_file, path, spec), path)


def decode_mask_file(path: Path, spec: DatasetSpec) -> MaskFile:
    """load_mask without further attempts."""
    with open_image(path) as image:
        check_mask_format(image, path)
        raw, orientation = raw_mode(image), orientation_of(image)
        image = turn(image, orientation, spec.reading)
        mode, is_gray = image.mode, image.mode in ("1", "L") or image.mode.startswith("I")
        if spec.colors is not None or not (is_gray or mode == "P"):
            if ";16" in raw:
                raise BadSample(f"{path}: a mask with 16 bits per channel; save it with 8 bits per channel")
            transparent = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
            values = packed_colors(image)
            return MaskFile(values, mode, colored=True, orientation=orientation, transparent=transparent)
        if mode == "P":
            values, palette = look_up_gray(image)
            return MaskFile(values, mode, palette=palette, orientation=orientation)
        values, bits = gray_values(image, raw)
        return MaskFile(values, mode, bits=bits, orientation=orientation)


def check_mask_format(image: Image.Image, path: Path) -> None:
    """Raise BadSample if the file does not keep a mask's values, or Pillow changes them; before they are loaded."""
    compression = image.info.get("compression")
    if image.format in ("JPEG", "MPO", "JPEG2000") or compression in ("jpeg", "tiff_jpeg", "webp"):
        name = f"TIFF with {compression} compression" if image.format == "TIFF" else image.format
        raise BadSample(f"{path}: a {name} mask; {name} changes values. Save masks as PNG, from the originals")
    if image.format == "TIFF" and image.tag_v2.get(INTERPRETATION) == 0:
        raise BadSample(f"{path}: a TIFF mask in which 0 is white (MinIsWhite); save it as 8-bit PNG")
    if image.mode == "F":
        raise BadSample(f"{path}: a mask of floating-point values; save the class indices as 8-bit PNG")
    if image.format == "PPM" and image.mode == "1":
        raise BadSample(f"{path}: a PBM mask, in which 1 is black; save it as 8-bit PNG")
    if image.format == "PPM" and image.tile[0][0].startswith("ppm"):
        most = image.tile[0][3][1]
        if most not in (255, 65535):
            raise BadSample(f"{path}: a mask whose largest value is {most}; save it as 8-bit PNG")


def packed_colors(image: Image.Image) -> np.ndarray:
    """Color of each pixel as 0xRRGGBB, (H, W) int32, for images of any mode; alpha is dropped."""
    rgb = np.asarray(image.convert("RGB"))
    packed = rgb[..., 0].astype(np.int32)
    for channel in (1, 2):
        packed <<= 8
        packed |= rgb[..., channel]
    return packed


def gray_values(image: Image.Image, raw: str) -> tuple[np.ndarray, int]:
    """The stored values of a gray image, and their bits; raw: its raw_mode."""
    bits = {"1": 1, "L": 8}.get(image.mode, 16)
    values = np.array(image, np.uint8) if bits <= 8 else np.asarray(image)
    if raw.startswith(("L;2", "L;4")):  # Pillow spreads them over 0..255
        bits = int(raw[2])
        values //= 255 // (2**bits - 1)
    return values, bits


def look_up_gray(image: Image.Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """Values of a palette image: gray values, and (), if all entries are gray; else the indices, and the colors.

    Also the indices, and (), where the grays do not tell the indices in use apart: Pillow saves an array as "P" with
    one black entry.
    """
    indices = np.array(image, np.uint8)
    entries = np.array(image.getpalette("RGB"), np.int32).reshape(-1, 3)
    if (entries == entries[:, :1]).all():
        used = np.flatnonzero(np.bincount(indices.ravel()))
        alike = len(entries) > 1 and len(np.unique(entries[:, 0])) == 1  # also in a file that uses one index
        if alike or used[-1] >= len(entries) or len(np.unique(entries[used, 0])) < len(used):
            return indices, ()
        table = np.zeros(256, np.uint8)
        table[: len(entries)] = entries[:, 0]
        return table[indices], ()
    return indices, tuple((entries @ (1 << 16, 1 << 8, 1)).tolist())


def format_counts(values: np.ndarray) -> str:
    """'7 (3 pixels), 9 (1 pixel)'; at most eight values, then the number of further ones."""
    pairs = zip(*np.unique(values, return_counts=True), strict=True)
    items = [f"{value} ({count} pixel{'s' if count > 1 else ''})" for value, count in pairs]
    return abbreviate(items, 8)


def format_color(packed: int) -> str:
    """0xRRGGBB -> '255,0,0', as written in data.custom.color_map."""
    return f"{packed >> 16},{packed >> 8 & 255},{packed & 255}"


def read_mask(path: Path, spec: DatasetSpec) -> np.ndarray:
    """(H, W) uint8 class indices 0..K-1 and spec.ignore_index; raises BadSample for any other value."""
    file = load_mask(path, spec)
    mask = decode_mask(file, path, spec)
    check_palette(file, path, spec)
    return mask


def decode_mask(file: MaskFile, path: Path, spec: DatasetSpec) -> np.ndarray:
    """Class indices of a mask's stored values; see read_mask."""
    values = file.values
    if spec.colors is not None:
        return decode_colors(values, spec.colors, path)
    if file.colored:
        raise BadSample(
            f"{path}: masks must hold class indices 0..K-1 in one channel, found {file.mode}; "
            "list its colors in data.custom.color_map, or convert the masks to indices and save 8-bit PNG"
        )
    if values.dtype != np.uint8:
        outside = (values < 0) | (values > spec.max_stored)
        if outside.any():
            raise illegal_values(values[outside], path, spec)
    mask = spec.decode_mask(values).astype(np.uint8, copy=False)
    illegal = (mask >= spec.num_classes) & (mask != spec.ignore_index)
    if illegal.any():
        raise illegal_values(values[illegal], path, spec)
    return mask


def illegal_values(values: np.ndarray, path: Path, spec: DatasetSpec) -> BadSample:
    """The error for stored values (N,) that have no class."""
    hint = spec.mask_hint or (
        f"Correct the mask (ignored pixels hold {spec.ignore_index}), or describe your own data in data.custom"
    )
    return BadSample(
        f"{path}: illegal mask values {format_counts(values)}; "
        f"{spec.name} has classes 0..{spec.num_classes - 1}. {hint}"
    )


def check_palette(file: MaskFile, path: Path, spec: DatasetSpec) -> None:
    """Raise BadSample if a pixel's color in the palette is that of another class than its index."""
    colors = list(map(pack_color, spec.palette))
    targets = spec.decode_mask(np.arange(len(file.palette))).tolist()
    for index, (color, target) in enumerate(zip(file.palette, targets, strict=True)):
        if target >= len(colors) or color == colors[target] or color not in colors or index not in file.values:
            continue
        raise BadSample(
            f"{path}: index {index} of its palette has the color {format_color(color)} of class "
            f"{spec.classes[colors.index(color)]}, but is the index of class {spec.classes[target]}. If the colors "
            "define the classes, list them in data.custom.color_map; if the indices do, give the classes' colors in "
            "data.custom.palette"
        )


def decode_colors(packed: np.ndarray, colors: ColorTable, path: Path) -> np.ndarray:
    """Colors 0xRRGGBB (H, W) -> class indices (H, W) uint8; raises BadSample for a color without a class."""
    mask, unknown = colors.decode(packed)
    if unknown.any():
        others = packed[unknown]
        first = others.min()
        count = int((others == first).sum())
        raise BadSample(
            f"{path}: illegal mask colors {format_color(int(first))} ({count} pixels)"
            f"{' and more' if count < len(others) else ''}; data.custom.color_map lists "
            f"{', '.join(map(format_color, colors.colors))}. Add them there, "
            "void ones as ignore_index (by default 255), or save the mask without smoothed borders"
        )
    return mask


def read_pair(sample: Sample, spec: DatasetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) uint8 and mask (H, W) uint8 of a labeled sample; raises BadSample if their sizes differ."""
    assert sample.mask is not None, f"{sample.image} is unlabeled"
    image, mask = read_image(sample.image, spec.reading), read_mask(sample.mask, spec)
    check_same_size(sample, image, mask)
    return image, mask


def check_same_size(sample: Sample, image: np.ndarray, mask: np.ndarray) -> None:
    if image.shape[:2] != mask.shape:
        raise size_mismatch(sample, image.shape[1::-1], mask.shape[::-1])


def size_mismatch(sample: Sample, size: tuple[int, int], mask_size: tuple[int, int]) -> BadSample:
    """The error for an image and a mask of different (width, height)."""
    remedy = "create the mask again at the image's size; resize masks with nearest-neighbor only"
    if read_size(sample.image) == mask_size:
        remedy = (
            "the image is rotated by its EXIF orientation and the mask is not: if masks were drawn on the pixels as "
            "stored, set data.custom.orientation=stored; else rotate the mask as well, and those of images rotated by "
            "180 degrees, which cannot be detected by their size"
        )
    return BadSample(
        f"image and mask differ in width x height: {sample.image} is {size[0]} x {size[1]}, "
        f"{sample.mask} is {mask_size[0]} x {mask_size[1]}; {remedy}"
    )
