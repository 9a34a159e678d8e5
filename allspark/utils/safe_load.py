"""Files from strangers, read so that they can only say what they hold: no code runs, nothing grows beyond the file."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A number of numpy's, as the released code saves its best mIoU: what makes one, under its old and its new name
SCALAR = np.float64(0).__reduce__()[0]
NUMBERS = [(SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMBERS += [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64"))]


def load_tensors(path: Path) -> Any:
    """What torch.save wrote or, by the suffix, a .safetensors file: plain values and CPU tensors.

    Raises whatever torch raises for a damaged or foreign file, ValueError for one that would unpack to more than it
    holds; the caller says which file it is and what to do.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    check_container(path)
    with warnings.catch_warnings():  # torch warns of a pickle that it then refuses
        warnings.simplefilter("ignore")
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    check_tensors(content, path.stat().st_size)
    return content


def check_container(path: Path) -> None:
    """ValueError unless it is a zip as torch.save writes it, nothing in it compressed, or its older pickle."""
    with path.open("rb") as file:
        begin = file.read(4)
    if begin[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("its content is compressed, which torch.save never does")
        if sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it claims more content than it has bytes")
    elif begin[:1] != b"\x80":
        raise ValueError("it is neither a zip nor a pickle, as torch.save writes them")


def check_tensors(content: Any, size: int) -> None:
    """ValueError unless the tensors in `content` are plain ones that fit into `size` bytes."""
    storages = {}
    for tensor in tensors_in(content):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError("it holds sparse, quantized or meta tensors, or none of torch's own")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}, more than the file has bytes")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError("its tensors take more bytes than the file has")


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and lists; a list that stands in many places is looked through once."""
    seen, rest = set(), [content]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            rest.extend(item.values() if isinstance(item, Mapping) else item)
