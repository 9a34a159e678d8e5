"""Recognizing what network a weight file belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from allspark.config import BottleneckConfig, ModelConfig
from allspark.models import mit, resnet
from allspark.models.deeplab import LOW_CHANNELS
from allspark.models.segmentor import build_encoder, build_model
from allspark.models.shapes_only import shapes_only
from allspark.models.timm_encoder import DINOV2
from allspark.utils.errors import UserError, abbreviate
from allspark.weights.key_maps import IMAS, KEY_MAPS, KeyMap
from allspark.weights.loading import (
    LoadResult,
    WeightFile,
    check_finite,
    load_matching,
    reject_registers,
    to_our_names,
)

ENCODER_SIZES = {**mit.SIZES, **resnet.SIZES}  # encoders that can be recognized by tensor shapes
DINOV2_SIZES = dict(zip(DINOV2, ((384, 12), (768, 12), (1024, 24), (1536, 40)), strict=True))  # width, blocks
# Classifier weights that come with an encoder, or that the original SegFormer head contains but never uses
LEFTOVERS = re.compile(r"(head|fc|classifier|decode_head\.conv_seg)\.(weight|bias)")
RELEASED_ONLY = ("decoder.allspark.embeddings.", "decoder.allspark.encoder.")  # of AllSpark's published checkpoints
PATCHES = "encoder.body.model.patch_embed.proj.weight"


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
