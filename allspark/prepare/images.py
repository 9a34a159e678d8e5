"""Masks and pictures from bytes to bytes: decoded, their values checked, encoded as the configs expect."""

from __future__ import annotations

import io
from collections.abc import Collection

import numpy as np
from PIL import Image

from allspark.data.image_io import format_counts, open_limited
from allspark.utils.errors import UserError


def decode_image(content: bytes, name: str) -> Image.Image:
    """UserError: truncated, no image, or more pixels than Pillow's limit (data/base.py)."""
    try:
        image = open_limited(io.BytesIO(content))
        image.load()
        return image
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(f"{name}: truncated or not an image ({error}); get its archive again") from None


def decode_indices(content: bytes, name: str) -> np.ndarray:
    """(H, W) uint8 as stored: of a palette image the indices, never the colours."""
    image = decode_image(content, name)
    if image.mode not in ("L", "P", "1"):
        raise UserError(f"{name}: a mask of 8-bit indices was expected, not {image.mode}; get its archive again")
    return np.array(image, np.uint8)


def check_values(mask: np.ndarray, values: Collection[int], ignore: int, name: str, ignore_unknown: bool) -> np.ndarray:
    """The mask; values that are not among `values` become `ignore` where that was asked for, else UserError."""
    unknown = ~np.isin(mask, list(values))
    if not unknown.any():
        return mask
    if not ignore_unknown:
        raise UserError(f"{name}: unexpected mask values {format_counts(mask[unknown])}; {REMEDY}")
    return np.where(unknown, ignore, mask).astype(np.uint8)


REMEDY = "get its archive again, or use --ignore-unknown, which makes these pixels ignored ones"


def encode_png(mask: np.ndarray) -> bytes:
    """8-bit grey PNG of an (H, W) uint8 array."""
    return encode_image(Image.fromarray(mask), "PNG")


def encode_image(image: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
