"""Files from strangers, read so that they can only say what they hold: no code runs, nothing grows beyond the file."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

MAX_YAML = 1 << 20  # characters
MAX_NODES = 100_000  # of a YAML text with its aliases written out
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
    for tensor in iter_tensors(content):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError("it holds sparse, quantized or meta tensors, or none of torch's own")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}, more than the file has bytes")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError("its tensors take more bytes than the file has")


def iter_tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and lists; a list that stands in many places is looked through once."""
    seen, rest = set(), [content]
    while rest:
        item = rest.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            rest.extend(item.values() if isinstance(item, Mapping) else item)


def parse_yaml(text: str) -> Any:
    """yaml.safe_load of a text of bounded size, also where aliases multiply it; ValueError: anything else."""
    if len(text) > MAX_YAML:
        raise ValueError(f"{len(text)} characters are no settings; at most {MAX_YAML} are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None and count_nodes(node, {}) > MAX_NODES:
                raise ValueError(f"its aliases stand for more than {MAX_NODES} values")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("values are nested too deep") from None
    except Exception as error:  # beside yaml.YAMLError what int, float, date and the like say of a value
        raise ValueError(" ".join(re.split(r"\s+", str(error))) or type(error).__name__) from None


def count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are with every alias replaced by what it stands for; `known`: of nodes seen so far."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_NODES + 1  # until it is counted: one that holds itself never ends
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    count = 1
    for child in children:
        count = min(count + count_nodes(child, known), MAX_NODES + 1)
    known[id(node)] = count
    return count
