"""Masks and images from bytes to bytes: decoded, values checked, encoded as the configs expect."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from PIL import Image

from allspark.data.image_files import open_limited, raw_mode
from allspark.data.mask_io import format_counts, gray_values, look_up_gray
from allspark.utils.errors import UserError

REMEDY = "download its archive again, or use --ignore-unknown to ignore these pixels"


def decode_image(content: bytes, name: str) -> Image.Image:
    """UserError: truncated, not an image, or too large (see data/image_io.py)."""
    try:
        image = open_limited(io.BytesIO(content))
        image.load()
        return image
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(f"{name}: truncated or not an image ({error}); download its archive again") from None


def decode_indices(content: bytes, name: str) -> np.ndarray:
    """(H, W) uint8: gray values, or the indices of a palette of colors, as load_mask reads them."""
    image = decode_image(content, name)
    if image.mode not in ("L", "P", "1"):
        raise UserError(f"{name}: expected a mask of 8-bit indices, found {image.mode}; download its archive again")
    if image.mode == "P":
        return look_up_gray(image)[0]
    return gray_values(image, raw_mode(open_limited(io.BytesIO(content))))[0]


def check_values(mask: np.ndarray, values: Collection[int], ignore: int, name: str, ignore_unknown: bool) -> np.ndarray:
    """The mask; other values than `values` become `ignore` if `ignore_unknown`, else raise UserError."""
    unknown = ~np.isin(mask, list(values))
    if not unknown.any():
        return mask
    if not ignore_unknown:
        raise UserError(f"{name}: unexpected mask values {format_counts(mask[unknown])}; {REMEDY}")
    return np.where(unknown, ignore, mask).astype(np.uint8)


def encode_png(mask: np.ndarray) -> bytes:
    """8-bit gray PNG of an (H, W) uint8 array."""
    return encode_image(Image.fromarray(mask), "PNG")


def encode_image(image: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
