"""Loading weight files of any known format, and reporting what does not fit. Formats: key_maps.py."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from allspark.models.input_channels import adapt_filters
from allspark.models.segmentor import Segmentor
from allspark.models.timm_encoder import DINOv2, TimmEncoder
from allspark.utils.errors import UserError, abbreviate, reason_of
from allspark.utils.retry import retry_transient
from allspark.utils.safe_load import has_valid_values, load_tensors, same_kind
from allspark.weights.key_maps import (
    KeyMap,
    RenamedWeights,
    detect_key_map,
    rename_weights,
    strip_wrappers,
)
from allspark.weights.mirrors import PUBLISHED

TEACHERS = ("model_ema", "teacher_state")  # where UniMatch V2 and iMAS keep the network that they report
OURS_TEACHER = "teacher.model."  # in the state of a method of this code
BLOCK = re.compile(r"((?:.*\.)?)(\d+)(\.\D.*)")  # name of a tensor, with the number of its innermost block
SHARD = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")


@dataclass(frozen=True)
class WeightFile:
    """A weight file.

    Args:
        tensors: by their names in the file, without a wrapper's prefix.
        content: other values in the file.
        teacher: the tensors are those of an EMA teacher, which is in the file beside a student.
    """

    path: Path
    tensors: dict[str, Tensor]
    content: Mapping[str, Any]
    teacher: bool = False


def read_weights(path: str | Path, student: bool = False) -> WeightFile:
    """Read a state_dict from a .pth, .pt, .bin (without running code in it) or .safetensors file.

    Args:
        path: of the file.
        student: of a training checkpoint with student and EMA teacher, read the student.
    """
    path = Path(path)
    if path.is_dir():
        name = "latest.pth" if (path / "latest.pth").is_file() else "model.safetensors"
        raise UserError(f"{path}: is a folder; give the file in it, such as {path / name}")
    if not path.is_file():
        name = path.stem if path.stem in PUBLISHED else "NAME"
        raise UserError(
            f"{path}: no such weight file; give its path, 'none' to start without weights, "
            f"or fetch published ones: python -m allspark weights fetch {name}"
        )
    if SHARD.search(path.name):
        raise UserError(
            f"{path}: is one of several files of a model; save it as one file, "
            f"in transformers with save_pretrained(..., max_shard_size='100GB')"
        )
    try:
        content = retry_transient(partial(load_tensors, path))
    except Exception as error:  # torch raises many kinds for truncated, foreign or malicious files
        raise UserError(
            f"{path}: not a readable weight file ({reason_of(error)}); fetch or copy it again, "
            f"or, if it contains more than tensors, save only its state_dict with the program that wrote it"
        ) from error
    others: Mapping[str, Any] = {}
    teacher = False
    for key in (*(() if student else TEACHERS), "model", "model_state", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            teacher |= key in TEACHERS
            others = {name: value for name, value in content.items() if name != key}
            content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: contains no named tensors; a weight file must contain a state_dict")
    if isinstance(method := others.get("method"), Mapping) and not student:  # a checkpoint of this code
        names = [name for name in method if str(name).startswith(OURS_TEACHER) and isinstance(method[name], Tensor)]
        averaged = {name.removeprefix(OURS_TEACHER): method[name] for name in names}
        tensors, teacher = {**tensors, **averaged}, bool(averaged)
    return WeightFile(path, strip_wrappers(tensors), others, teacher)


def to_our_names(file: WeightFile) -> tuple[KeyMap | None, RenamedWeights]:
    """Detect the format and rename; tensors of unknown formats, such as a custom encoder's, keep their names."""
    key_map = detect_key_map(file.tensors)
    if key_map is None:
        return None, RenamedWeights(file.tensors, {name: name for name in file.tensors}, [])
    return key_map, rename_weights(file.tensors, key_map)


@dataclass(frozen=True)
class LoadResult:
    """The result of loading a file into a network.

    Args:
        loaded: tensors that fit.
        wrong: name -> why it does not fit.
        missing: names in the network only.
        unexpected: names in the file only.
    """

    loaded: dict[str, Tensor]
    wrong: dict[str, str]
    missing: list[str]
    unexpected: list[str]

    @property
    def bad(self) -> list[str]:
        """What the network needs and the file does not provide."""
        return [*self.wrong, *self.missing]


def load_matching(module: nn.Module, found: RenamedWeights, prefix: str = "") -> LoadResult:
    """Load what fits into the module, whose name in the network is `prefix`."""
    own = module.state_dict()
    result = LoadResult({}, {}, [], list(found.unknown))
    for name, tensor in found.tensors.items():
        short = name.removeprefix(prefix)
        if short not in own:
            result.unexpected.append(found.sources[name])
            continue
        want = own[short]
        if tensor.shape == (*want.shape, 1, 1):  # a 1x1 convolution instead of our linear layer
            tensor = tensor.flatten(1)
        if (
            tensor.ndim == want.ndim == 4 and tensor.shape[1] == 3 != want.shape[1]
        ):  # images with other channels than RGB
            adapted = adapt_filters(tensor, want.shape[1])
            tensor = adapted if adapted.shape == want.shape else tensor
        if tensor.shape != want.shape:
            result.wrong[short] = f"has shape {tuple(tensor.shape)}, must be {tuple(want.shape)}"
        elif not same_kind(tensor, want):
            result.wrong[short] = f"has type {tensor.dtype}, must be {want.dtype}"
        else:
            result.loaded[short] = tensor
    missing = module.load_state_dict(result.loaded, strict=False).missing_keys  # respects modules with optional tensors
    result.missing.extend(name for name in missing if name not in result.wrong)
    return result


def check_finite(tensors: Mapping[str, Tensor], path: Path, sources: Mapping[str, str] | None = None) -> None:
    for name, tensor in tensors.items():
        if not has_valid_values(tensor):
            source = (sources or {}).get(name, name)
            label = name if source == name else f"{source} (here {name})"
            raise UserError(f"{path}: {label} contains NaN, infinite or huge values; use another copy of the file")


def load_encoder(model: Segmentor, path: str | Path) -> str:
    """Load encoder weights (`model.pretrained`) from an encoder or model file of any format -> a log line."""
    if isinstance(model.encoder, TimmEncoder):
        model.encoder.check_file(Path(path))
    file = read_weights(path)
    found = encoder_tensors(model.encoder, file)
    result = load_matching(model.encoder, found, "encoder.")
    own = model.encoder.state_dict()
    if bad := [name for name in result.bad if not name.startswith("pyramid.")]:  # never in a file
        raise UserError(
            f"{path}: does not fit this encoder; {len(bad)} of {len(own)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; is the file for another variant than model.encoder?"
        )
    check_depth(own, [name.removeprefix("encoder.") for name in found.tensors], path)
    check_finite(result.loaded, file.path)
    left = f", unused: {abbreviate(result.unexpected)}" if result.unexpected else ""
    return f"encoder weights {path}{of_teacher(file)}: {len(result.loaded)} tensors{left}"


def check_depth(own: Iterable[str], names: Iterable[str], path: str | Path) -> None:
    """UserError if a file has more blocks than the network: variants of an encoder often differ in depth alone.

    Args:
        own: names of the network's tensors.
        names: of the file's tensors.
        path: of the file.
    """
    depths: dict[tuple[str, str], int] = {}  # what is before and after the number of a block -> the largest number
    for block in filter(None, map(BLOCK.fullmatch, own)):
        depths[block[1], block[3]] = max(depths.get((block[1], block[3]), 0), int(block[2]))
    for block in filter(None, map(BLOCK.fullmatch, names)):
        if int(block[2]) > depths.get((block[1], block[3]), math.inf):
            raise UserError(
                f"{path}: is of a deeper network than model.encoder, which has no {block[0]}; use the weights of its "
                "own variant"
            )


def of_teacher(file: WeightFile) -> str:
    return " (EMA teacher)" if file.teacher else ""


def encoder_tensors(encoder: nn.Module, file: WeightFile) -> RenamedWeights:
    """A file's encoder tensors under our names; for timm's encoders converted by timm."""
    found = to_our_names(file)[1]
    known = found.tensors if isinstance(encoder, DINOv2) else file.tensors
    if isinstance(encoder, DINOv2):
        reject_registers(file)
    if not isinstance(encoder, TimmEncoder) or any(name.startswith("encoder.body.") for name in known):
        return found
    try:
        tensors = encoder.translate(file.tensors)
    except Exception as error:  # timm's converters do not check what they look up
        raise UserError(
            f"{file.path}: timm cannot convert it to weights of {encoder.name} ({reason_of(error)}); use another file"
        ) from error
    return RenamedWeights(tensors, {name: name for name in tensors}, [])


def reject_registers(file: WeightFile) -> None:
    """UserError for a DINOv2 that was trained with register tokens, which dinov2_* do not have."""
    if any(name.endswith(("register_tokens", "reg_token")) for name in file.tensors):
        raise UserError(
            f"{file.path}: a DINOv2 with registers; use model.encoder=timm:vit_small_patch14_reg4_dinov2 (or _base, "
            "_large, _giant), or weights without registers for dinov2_*"
        )


def init_from(model: Segmentor, path: str | Path) -> str:
    """Initialize from a whole model of any format (`model.init_from`) -> a log line.

    For fine-tuning to other classes or another crop: classifier and memory are dropped, everything else must fit.
    """
    file = read_weights(path)
    _, found = to_our_names(file)
    own = model.state_dict()
    dropped = ("decoder.classifier.", "bottleneck.memory.")
    wanted = {name for name in own if not name.startswith(dropped)}
    if model.bottleneck is not None and not any(name.startswith("bottleneck.") for name in found.tensors):
        wanted = {name for name in wanted if not name.startswith("bottleneck.")}  # trained without it: starts fresh
    loaded = {name: tensor for name, tensor in found.tensors.items() if name in wanted}
    memory = {name: tensor for name, tensor in own.items() if name.startswith("bottleneck.memory.")}
    result = load_matching(model, RenamedWeights({**loaded, **memory}, found.sources, []))
    if bad := [name for name in result.bad if name in wanted]:
        raise UserError(
            f"{path}: does not fit this model; {len(bad)} of {len(wanted)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; use the model.encoder, decoder and decoder_channels it was "
            f"trained with (for encoder weights use model.pretrained)"
        )
    check_depth(own, [name for name in found.tensors if not name.startswith(dropped)], path)
    check_finite(result.loaded, file.path)
    fresh = sorted({name.rsplit(".", 1)[0] for name in own if name not in loaded})
    unused = [found.sources[name] for name in found.tensors if name not in own] + found.unknown
    left = f"; unused: {abbreviate(unused)}" if unused else ""
    new = ", ".join(fresh)
    return f"init_from {path}{of_teacher(file)}: loaded {len(loaded)} tensors; newly initialized: {new}{left}"


def load_pretrained(model: Segmentor, pretrained: str, init: str) -> list[str]:
    """Load weights into a new model.

    Args:
        model: a Segmentor.
        pretrained: file of encoder weights, or none.
        init: file of a complete model to fine-tune, or none; loaded second.

    Returns:
        A log line for each file.

    Raises:
        UserError: a file is missing, damaged or does not fit.
    """
    reports = []
    if pretrained != "none":
        reports.append(load_encoder(model, os.path.expanduser(pretrained)))
    if init != "none":
        reports.append(init_from(model, os.path.expanduser(init)))
    return reports
