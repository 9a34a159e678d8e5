"""Loading tensors from untrusted files: no code runs, and memory stays bounded by the size of the file."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What pickles a NumPy scalar (the released code saves its best mIoU as one), under its old and its new module name
SCALAR = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
SAFE_GLOBALS += [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64"))]


def load_tensors(path: Path) -> Any:
    """Load a file written by torch.save or, by its suffix, a .safetensors file: plain values and CPU tensors.

    Raises:
        ValueError: the file would unpack to more than it contains.
        Exception: whatever torch raises for a damaged or foreign file; the caller adds file name and remedy.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    check_container(path)
    with warnings.catch_warnings():  # torch warns about a pickle before it refuses it
        warnings.simplefilter("ignore")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    check_tensors(content, path.stat().st_size)
    return content


def check_container(path: Path) -> None:
    """Raise ValueError unless the file is an uncompressed zip as written by torch.save, or its older pickle format."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("its content is compressed, which torch.save never does")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it declares more content than it has bytes")
    elif start[:1] != b"\x80":
        raise ValueError("it is neither a zip nor a pickle, as written by torch.save")


def check_tensors(content: Any, size: int) -> None:
    """Raise ValueError unless all tensors in `content` are plain ones that fit into `size` bytes."""
    storages = {}
    for tensor in iter_tensors(content):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError("it contains sparse, quantized, meta or custom tensors")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"it contains a tensor of shape {tuple(tensor.shape)}, larger than the file")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError("its tensors take more bytes than the file has")


def iter_tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings and lists; a container that occurs repeatedly is visited once."""
    seen, stack = set(), [content]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, Mapping) else item)
