"""Loading weight files of any known format, and reporting what does not fit. Formats: key_maps.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from allspark.config import BottleneckConfig, ModelConfig
from allspark.models import mit, resnet
from allspark.models.deeplab import LOW_CHANNELS
from allspark.models.input_channels import adapt_filters
from allspark.models.segmentor import Segmentor, build_encoder, build_model
from allspark.models.shapes_only import shapes_only
from allspark.models.timm_encoder import DINOV2, DINOv2, TimmEncoder
from allspark.utils.errors import UserError, abbreviate, reason_of
from allspark.utils.retry import retry_transient
from allspark.utils.safe_load import has_valid_values, load_tensors, same_kind
from allspark.weights.key_maps import (
    IMAS,
    KEY_MAPS,
    KeyMap,
    RenamedWeights,
    detect_key_map,
    rename_weights,
    strip_wrappers,
)
from allspark.weights.mirrors import PUBLISHED

ENCODER_SIZES = {**mit.SIZES, **resnet.SIZES}  # encoders that can be recognized by tensor shapes
DINOV2_SIZES = dict(zip(DINOV2, ((384, 12), (768, 12), (1024, 24), (1536, 40)), strict=True))  # width, blocks
TEACHERS = ("model_ema", "teacher_state")  # where UniMatch V2 and iMAS keep the network that they report
OURS_TEACHER = "teacher.model."  # in the state of a method of this code
SHARD = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")
# Classifier weights that come with an encoder, or that the original SegFormer head contains but never uses
LEFTOVERS = re.compile(r"(head|fc|classifier|decode_head\.conv_seg)\.(weight|bias)")
RELEASED_ONLY = ("decoder.allspark.embeddings.", "decoder.allspark.encoder.")  # of AllSpark's published checkpoints


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


# Loading into a model that a config describes


def load_encoder(model: Segmentor, path: str | Path) -> str:
    """Load encoder weights (`model.pretrained`) from an encoder or model file of any format -> a log line."""
    if isinstance(model.encoder, TimmEncoder):
        model.encoder.check_file(Path(path))
    file = read_weights(path)
    result = load_matching(model.encoder, encoder_tensors(model.encoder, file), "encoder.")
    own = model.encoder.state_dict()
    if bad := [name for name in result.bad if not name.startswith("pyramid.")]:  # never in a file
        raise UserError(
            f"{path}: does not fit this encoder; {len(bad)} of {len(own)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; is the file for another variant than model.encoder?"
        )
    check_finite(result.loaded, file.path)
    left = f", unused: {abbreviate(result.unexpected)}" if result.unexpected else ""
    return f"encoder weights {path}{of_teacher(file)}: {len(result.loaded)} tensors{left}"


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
    check_finite(result.loaded, file.path)
    fresh = sorted({name.rsplit(".", 1)[0] for name in own if name not in loaded})
    return f"init_from {path}{of_teacher(file)}: loaded {len(loaded)} tensors; newly initialized: {', '.join(fresh)}"


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
        reports.append(load_encoder(model, pretrained))
    if init != "none":
        reports.append(init_from(model, init))
    return reports


# Loading into a model that is derived from the shapes in the file


@dataclass(frozen=True)
class Architecture:
    """The network a file belongs to. num_classes None: an encoder only; crop_size None: no memory."""

    model: ModelConfig
    num_classes: int | None
    crop_size: int | None


@dataclass(frozen=True)
class RecognizedModel:
    """A file of a known format, and its network with the weights loaded."""

    file: WeightFile
    key_map: KeyMap
    architecture: Architecture
    module: nn.Module  # a Segmentor, or only the encoder
    result: LoadResult
    sources: Mapping[str, str]

    @property
    def leftovers(self) -> list[str]:
        return [name for name in self.result.unexpected if LEFTOVERS.fullmatch(name)]

    def state(self) -> dict[str, Tensor]:
        """The complete state_dict; UserError if a tensor is missing, of another shape, or not finite."""
        if self.result.wrong:
            name, why = next(iter(self.result.wrong.items()))
            more = f" ({len(self.result.wrong)} tensors do not fit)" if len(self.result.wrong) > 1 else ""
            raise UserError(
                f"{self.file.path}: {name} {why} in a {self.architecture.model.encoder} like this{more}; "
                f"does it mix two models?"
            )
        if missing := self.result.missing:
            raise UserError(
                f"{self.file.path}: {len(missing)} tensors of this {self.architecture.model.encoder} are missing: "
                f"{abbreviate(missing)}; use the complete file (for only its encoder: model.pretrained)"
            )
        prefix = "encoder." if self.architecture.num_classes is None else ""
        loaded = {prefix + name: tensor for name, tensor in self.result.loaded.items()}
        check_finite(loaded, self.file.path, self.sources)
        return self.module.state_dict()


def recognize(file: WeightFile, encoder_only: bool = False, stride: int | None = None) -> RecognizedModel:
    """Detect the format by keys and the network by shapes, and load; UserError if either is unknown.

    Args:
        file: what was read.
        encoder_only: ignore everything but the encoder.
        stride: output stride 8 or 16 of a model of iMAS, which its file does not tell; None: 16.
    """
    key_map, found = to_our_names(file)
    if key_map is None:
        known = "; ".join(dict.fromkeys(each.title for each in KEY_MAPS))
        raise UserError(
            f"{file.path}: contains no MiT, ResNet or DINOv2 encoder in a known format ({known}); "
            f"its first names are {abbreviate(list(file.tensors), 3)}"
        )
    is_model = any(name.startswith("decoder.") for name in found.tensors) and not encoder_only
    if not encoder_only:
        reject_published(file)
    architecture = infer_architecture(found.tensors, file.path, is_model)
    if architecture.model.encoder.startswith("dinov2"):
        reject_registers(file)
    if key_map is IMAS and is_model:
        encoder = f"{architecture.model.encoder}_imas{'_os8' if stride == 8 else ''}"
        architecture = replace(architecture, model=replace(architecture.model, encoder=encoder))

    def load() -> tuple[nn.Module, LoadResult]:
        if is_model:
            module: nn.Module = build_model(architecture.model, architecture.num_classes, architecture.crop_size)
        else:
            module = build_encoder(architecture.model)
        return module, load_matching(module, found, "" if is_model else "encoder.")

    with shapes_only():
        module, result = load()
    if not result.bad:
        module, result = load()
    return RecognizedModel(file, key_map, architecture, module, result, found.sources)


def reject_published(file: WeightFile) -> None:
    if any(name.startswith(RELEASED_ONLY) for name in file.tensors):
        raise UserError(
            f"{file.path}: is one of the checkpoints published by the authors of AllSpark. They belong to a different "
            f"architecture than the released code (patch embeddings and encoder layers in the bottleneck; no map_in, "
            f"map_out or memory), which is not documented: https://github.com/xmed-lab/AllSpark/issues/3. "
            f"Its encoder can be used: model.pretrained={file.path}"
        )
    low = file.tensors.get("decoder.low_conv.0.weight")
    if low is not None and low.shape[:1] != (LOW_CHANNELS,):
        raise UserError(
            f"{file.path}: is a model of U2PL, or of iMAS with low_conv_planes other than {LOW_CHANNELS}; its decoder "
            f"is not implemented. Its encoder can be used as a start: "
            f"model.encoder=resnet101s_imas (or resnet50s_imas) model.pretrained={file.path}"
        )


def infer_architecture(tensors: Mapping[str, Tensor], path: Path, is_model: bool) -> Architecture:
    """Infer encoder, classes, decoder, heads and crop size from tensors under our names."""
    encoder = find_encoder(tensors, path)
    if not is_model:
        # With dpt a ViT has all of its layers; a pyramid replaces the last norm
        return Architecture(ModelConfig(encoder=encoder, decoder="dpt" if encoder in DINOV2 else "mlp"), None, None)
    num_classes, width = get_shape(tensors, "decoder.classifier.weight", 4, path)[:2]
    marks = {"decoder.convs.": "mlp_bn", "decoder.aspp.": "deeplab", "decoder.projects.": "dpt"}
    decoder = next((kind for mark, kind in marks.items() if any(name.startswith(mark) for name in tensors)), "mlp")
    bottleneck, crop = BottleneckConfig(name="none"), None
    if any(name.startswith("bottleneck.") for name in tensors):
        if encoder in DINOV2:
            raise UserError(
                f"{path}: bare weights of a ViT with a bottleneck; import the checkpoint of the run instead"
            )
        rows, columns = get_shape(tensors, "bottleneck.cross_branch.q.weight", 2, path)
        cells = get_shape(tensors, "bottleneck.memory.queue", 3, path)[2]
        side = math.isqrt(cells)
        if side**2 != cells or not cells:
            raise UserError(
                f"{path}: its memory holds maps of {cells} cells, not a square number, so the crop is unknown; import "
                "the checkpoint of the run instead"
            )
        bottleneck = BottleneckConfig(name="allspark", num_heads=max(1, rows // max(1, columns)))
        crop = ENCODER_SIZES[encoder].strides[-1] * (side - 1) + 1  # the released code: side = crop // 32 + 1
    fit = "resize" if decoder == "dpt" else "pad"  # as published
    model = ModelConfig(encoder=encoder, decoder=decoder, decoder_channels=width, fit=fit, bottleneck=bottleneck)
    return Architecture(model, num_classes, crop)


def get_shape(tensors: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Sequence[int]:
    if name not in tensors:
        raise UserError(f"{path}: {name} is missing; use the complete file")
    if tensors[name].ndim != ndim:
        raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, must have {ndim} dimensions")
    return tensors[name].shape


def find_encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name of the encoder with these widths, depths and (ResNet) stem."""
    if PATCHES in tensors:
        return find_dinov2(tensors, path)
    stem = first_dim(tensors, "encoder.bn1.weight")
    if stem:
        kinds = {name: size for name, size in resnet.SIZES.items() if size.stem == stem and not size.multi_grid}
        widths = tuple(first_dim(tensors, f"encoder.layer{stage}.0.conv3.weight") for stage in range(1, 5))
        depths = tuple(count_blocks(tensors, f"encoder.layer{stage}.") for stage in range(1, 5))
    else:
        kinds = mit.SIZES
        widths = tuple(first_dim(tensors, f"encoder.stages.{stage}.patch_embed.proj.weight") for stage in range(4))
        depths = tuple(count_blocks(tensors, f"encoder.stages.{stage}.blocks.") for stage in range(4))
    for name, size in kinds.items():
        if (size.channels, size.depths) == (widths, depths):
            return name
    known = "; ".join(f"{name} {join(size.channels)} and {join(size.depths)}" for name, size in kinds.items())
    after = f" after a stem of {stem}" if stem else ""
    raise UserError(
        f"{path}: its stages are {join(widths)} wide and {join(depths)} blocks deep{after}, unlike any known encoder "
        f"({known or 'a ResNet has a stem of 64 or 128'}); is the file complete, and of one model?"
    )


PATCHES = "encoder.body.model.patch_embed.proj.weight"


def find_dinov2(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name of the DINOv2 with this width and number of blocks."""
    width, _, patch, _ = get_shape(tensors, PATCHES, 4, path)
    depth = count_blocks(tensors, "encoder.body.model.blocks.")
    scaled = "encoder.body.model.blocks.0.ls1.gamma" in tensors
    for name, size in DINOV2_SIZES.items():
        if (size, patch, scaled) == ((width, depth), 14, True):
            return name
    raise UserError(
        f"{path}: a ViT {width} wide and {depth} blocks deep with patches of {patch} pixels is no DINOv2 (patches of "
        f"14 pixels; {'; '.join(f'{name} {join(size)}' for name, size in DINOV2_SIZES.items())}); for a ViT of timm, "
        f"set model.encoder=timm:NAME model.pretrained={path}"
    )


def count_blocks(tensors: Iterable[str], prefix: str) -> int:
    """Number of blocks whose names are `prefix`, a number from 0, and a dot."""
    found = (re.match(rf"{re.escape(prefix)}([0-9]+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def first_dim(tensors: Mapping[str, Tensor], name: str) -> int:
    """First dimension of a tensor; 0 if it is not in the file."""
    return len(tensors[name]) if name in tensors and tensors[name].ndim else 0


def join(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
