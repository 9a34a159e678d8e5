"""Loading tensors from untrusted files: no code runs, and memory stays bounded by the size of the file."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MAX_WEIGHT = 1e12  # magnitude; larger weights would overflow in a forward pass
# What pickles a NumPy scalar (the released code saves its best mIoU as one), under its old and its new module name
SCALAR = np.float64(0).__reduce__()[0]
SCALAR_NAMES = [f"numpy.{core}.multiarray scalar" for core in ("core", "_core")]
REBUILD = [f"torch._utils _rebuild_{what}" for what in ("tensor_v2", "parameter")]
CALLED = {*REBUILD, *SCALAR_NAMES, "numpy dtype", "collections OrderedDict", "_codecs encode"}
MAX_BUILDS = 64  # of attributes, which torch.save writes once per state_dict; each copies a mapping


def load_tensors(path: Path) -> Any:
    """Load a file written by torch.save or, by its suffix, a .safetensors file: plain values and CPU tensors.

    Raises:
        ValueError: the file would unpack to more than it contains.
        OSError: it cannot be read.
        Exception: whatever torch raises for a damaged or foreign file; the caller adds file name and remedy.
    """
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        safe_globals = [(rebuild_scalar, name.replace(" ", ".")) for name in SCALAR_NAMES]
        safe_globals += [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64"))]
        with path.open("rb") as file, warnings.catch_warnings():  # torch warns about a pickle before it refuses it
            warnings.simplefilter("ignore")
            check_container(file, size)
            file.seek(0)
            with torch.serialization.safe_globals(safe_globals):
                content = torch.load(file, map_location="cpu", weights_only=True)
    check_tensors(content, size)
    return content


def rebuild_scalar(dtype: Any, data: Any = None) -> np.generic:
    """A NumPy number; other scalars, such as void, may have any size."""
    if not (isinstance(dtype, np.dtype) and dtype.kind in "biuf" and isinstance(data, bytes)):
        raise ValueError("it contains NumPy values that are not numbers")
    return SCALAR(dtype, data)


def check_container(file: BinaryIO, size: int) -> None:
    """Raise ValueError unless the file is an uncompressed zip as written by torch.save, or its older pickle format."""
    start = file.read(4)
    if start == b"PK\x03\x04":
        check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("its content is compressed, which torch.save never does")
            if sum(info.file_size for info in infos) > size:
                raise ValueError("it declares more content than it has bytes")
            for info in infos:
                if info.filename.endswith("data.pkl"):
                    check_pickle(io.BytesIO(archive.read(info)), size)
    elif start[:1] == b"\x80":
        file.seek(0)
        for _ in range(5):  # magic number, version, byte order, content, names of the storages
            check_pickle(file, size)
    else:
        raise ValueError("it is neither a zip nor a pickle, as written by torch.save")


def check_directory(file: BinaryIO, size: int) -> None:
    """Raise ValueError unless the central directory is at the end of the zip, where torch and zipfile both find it."""
    end = size - 22
    file.seek(max(end - 76, 0))
    tail = file.read()
    signature, entries_size, offset, comment = struct.unpack("<4s8xLLH", tail[-22:])
    if tail[-42:-38] == b"PK\6\7":  # the 64-bit version of the record, and where it is
        (end,) = struct.unpack("<Q", tail[-34:-26])
        zip64, entries_size, offset = struct.unpack("<4s36xQQ", tail[-98:-42])
        if zip64 != b"PK\6\6" or end != size - 98:
            signature = b""
    if signature != b"PK\5\6" or comment or offset + entries_size != end:
        raise ValueError("it is truncated, or has more than one directory")


def check_pickle(file: BinaryIO, size: int) -> None:
    """Raise ValueError if a pickle calls what torch.save does not, or asks for more than `size` bytes.

    torch's own restriction to safe functions includes some that allocate any number of bytes, such as bytearray.
    The instructions are followed without executing them, with strings, numbers, tuples and names as values.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[Any, int] = {}
    builds = 0
    for opcode, arg, _ in pickletools.genops(file):
        taken = opcode.stack_before
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name.endswith("PUT"):
            memo[arg] = stack[-1]
        else:
            mark = pickletools.markobject in taken  # everything after the mark
            start = marks.pop() - taken.index(pickletools.markobject) if mark else len(stack) - len(taken)
            if start < 0:
                raise ValueError("its pickle is damaged")
            values = stack[start:]
            del stack[start:]
            if opcode.name == "GLOBAL":
                check_name(arg)
            elif opcode.name in ("REDUCE", "NEWOBJ"):
                check_call(*values)
            elif opcode.name == "BINPERSID":
                key, numel = read_storage(values[0])
                storages[key] = max(numel, storages.get(key, 0))
            builds += opcode.name == "BUILD"
            if opcode.stack_after:
                is_tuple = "TUPLE" in opcode.name
                stack.append(memo[arg] if opcode.name.endswith("GET") else tuple(values) if is_tuple else arg)
    if builds > MAX_BUILDS or sum(storages.values()) > size:
        raise ValueError("it asks for more memory than a file of its size needs")


def check_name(name: str) -> None:
    module, _, attribute = name.partition(" ")
    if name not in CALLED and not (module == "torch" and attribute.endswith("Storage")):
        raise ValueError(f"it contains {module}.{attribute}, but only tensors and plain values are loaded")


def check_call(function: Any, args: Any) -> None:
    """Only of `CALLED`; without data of unknown size, which could be copied again and again."""
    known = function in CALLED and isinstance(args, tuple)
    if function == "collections OrderedDict":
        known = args == ()
    elif function == "_codecs encode":  # the bytes of a number
        known = len(args) == 2 and isinstance(args[0], str) and len(args[0]) <= 64 and args[1] == "latin1"
    if not known:
        raise ValueError("it contains a call that torch.save does not write for tensors and plain values")


def read_storage(persistent: Any) -> tuple[Any, int]:
    """Key and number of elements of a storage, ("storage", type, key, device, numel, ...)."""
    if not (isinstance(persistent, tuple) and len(persistent) >= 5 and isinstance(persistent[2], str)):
        raise ValueError("a tensor without a storage")
    numel = persistent[4]
    if not isinstance(numel, int) or numel < 0:
        raise ValueError("a tensor without a size")
    return persistent[2], numel


def check_tensors(content: Any, size: int) -> None:
    """Raise ValueError unless all tensors in `content` are plain ones that fit into `size` bytes."""
    storages = {}
    for tensor in iter_tensors(content):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError("it contains sparse, quantized, meta or custom tensors")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
            raise ValueError(f"it contains a tensor of type {tensor.dtype}, which no weights of a network have")
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


def has_valid_values(tensor: Tensor) -> bool:
    """Whether no weight is NaN, infinite or so large that a forward pass would overflow."""
    return not tensor.is_floating_point() or bool((tensor.abs() < MAX_WEIGHT).all())


def same_kind(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file can replace one of the network: floating point for floating point."""
    return tensor.is_floating_point() == own.is_floating_point()
