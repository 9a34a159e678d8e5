"""Weight files: reading tensors only, taking what fits, telling what did not. The names of others: naming.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from allspark.config import BottleneckConfig, ModelConfig
from allspark.models import mit, resnet
from allspark.models.segmentor import ENCODERS, Segmentor, build_model
from allspark.models.timm_encoder import TimmEncoder
from allspark.utils.errors import UserError, reason_of
from allspark.utils.safe_load import load_tensors
from allspark.weights.key_maps import (
    KEY_MAPS,
    RELEASED,
    KeyMap,
    RenamedWeights,
    detect_key_map,
    rename_weights,
    strip_wrappers,
)

MIT_SIZES = dict(zip((f"mit_b{i}" for i in range(6)), (mit.B0, mit.B1, mit.B2, mit.B3, mit.B4, mit.B5), strict=True))
ENCODER_SIZES = {**MIT_SIZES, **resnet.SIZES}  # encoders that are told by the shapes of a file
SHARD = re.compile(r"-\d{5}-of-\d{5}\.|\.index\.json$")
# Weights of classifiers that came with an encoder, or that the original SegFormer head carries and never uses
LEFTOVERS = re.compile(r"(head|fc|classifier|decode_head\.conv_seg)\.(weight|bias)")
PUBLISHED = ("decoder.allspark.embeddings.", "decoder.allspark.encoder.")


@dataclass(frozen=True)
class WeightFile:
    """A file as read. tensors: by the names in it, less a wrapper's prefix; content: the container's other values."""

    path: Path
    tensors: dict[str, Tensor]
    content: Mapping[str, Any]


def read_weights(path: str | Path) -> WeightFile:
    """A .pth, .pt or .bin (no code in it can run) or .safetensors file with a state_dict in it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the weight file in it, such as {path / 'model.safetensors'}")
    if not path.is_file():
        name = path.stem if path.stem in ENCODER_SIZES else "mit_b5"
        raise UserError(
            f"{path}: no such weight file; give its path, 'none' to start without one, "
            f"or fetch ImageNet weights: python -m allspark weights fetch {name}"
        )
    if SHARD.search(path.name):
        raise UserError(
            f"{path}: is part of a model in several files; all tensors must be in one, "
            f"which save_pretrained(..., max_shard_size='100GB') of transformers writes"
        )
    content = load_container(path)
    others: Mapping[str, Any] = {}
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            others = {name: value for name, value in content.items() if name != key}
            content = content[key]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no named tensors; a weight file is a state_dict")
    return WeightFile(path, strip_wrappers(tensors), others)


def load_container(path: Path) -> Any:
    try:
        return load_tensors(path)
    except Exception as error:  # a truncated zip, a pickle with code, a foreign file: torch raises many kinds
        raise UserError(
            f"{path}: not a readable weight file ({reason_of(error)}); fetch or copy it again, "
            f"or, where it holds more than tensors, save its state_dict alone with the program that wrote it"
        ) from error


def rename_released(name: str) -> str:
    """Our name of a parameter or buffer of the released code, or of the original mit_b*.pth; unknown names stay."""
    return RELEASED.ours(name) or name


def to_our_names(file: WeightFile) -> tuple[KeyMap | None, RenamedWeights]:
    """Under our names; of a naming that nobody knows, such as an encoder of one's own, as they are."""
    naming = detect_key_map(file.tensors)
    if naming is None:
        return None, RenamedWeights(file.tensors, {name: name for name in file.tensors}, [])
    return naming, rename_weights(file.tensors, naming)


@dataclass(frozen=True)
class LoadResult:
    """Which tensors of a file have their place in a network. wrong: name -> why; unexpected: names of the file."""

    taken: dict[str, Tensor]
    wrong: dict[str, str]
    missing: list[str]
    unexpected: list[str]

    def bad(self) -> list[str]:
        """What the network needs and the file does not give."""
        return [*self.wrong, *self.missing]


def load_matching(module: nn.Module, found: RenamedWeights, prefix: str = "") -> LoadResult:
    """Load what fits into the module; `prefix`: where the module stands in the network."""
    own = module.state_dict()
    result = LoadResult({}, {}, [], list(found.unknown))
    for name, tensor in found.tensors.items():
        short = name.removeprefix(prefix)
        if short not in own:
            result.unexpected.append(found.sources[name])
            continue
        want = own[short]
        if tensor.shape == (*want.shape, 1, 1):  # a 1x1 convolution where a linear layer stands here
            tensor = tensor.flatten(1)
        if tensor.shape != want.shape:
            result.wrong[short] = f"is {tuple(tensor.shape)}, must be {tuple(want.shape)}"
        elif tensor.is_floating_point() != want.is_floating_point():
            result.wrong[short] = f"is of {tensor.dtype}, must be of {want.dtype}"
        else:
            result.taken[short] = tensor
    missing = module.load_state_dict(result.taken, strict=False).missing_keys  # without what a module can do without
    result.missing.extend(name for name in missing if name not in result.wrong)
    return result


def check_finite(tensors: Mapping[str, Tensor], path: Path, sources: Mapping[str, str] | None = None) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            source = (sources or {}).get(name, name)
            there = name if source == name else f"{source} (here {name})"
            raise UserError(f"{path}: {there} holds NaN or infinite values; use another copy of the file")


def abbreviate(names: Sequence[str], limit: int = 4) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


# Into a model that a recipe describes


def load_encoder(model: Segmentor, path: str | Path) -> str:
    """Encoder weights (`model.pretrained`) of any format, from a file of them or of a whole model -> a report line."""
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, TimmEncoder):
        encoder.check_file(Path(path))
    file = read_weights(path)
    result = load_matching(model.encoder, encoder_tensors(model.encoder, file), "encoder.")
    own = model.encoder.state_dict()
    if bad := [name for name in result.bad() if not name.startswith("pyramid.")]:  # which no file has
        raise UserError(
            f"{path}: does not fit this encoder; {len(bad)} of {len(own)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; is it the file of another variant than model.encoder?"
        )
    check_finite(result.taken, file.path)
    left = f", left out: {abbreviate(result.unexpected)}" if result.unexpected else ""
    return f"encoder weights {path}: {len(result.taken)} tensors{left}"


def encoder_tensors(encoder: nn.Module, file: WeightFile) -> RenamedWeights:
    """What a file holds for an encoder, under our names; of timm's encoders its own converters know the formats."""
    if not isinstance(encoder, TimmEncoder) or any(name.startswith("encoder.body.") for name in file.tensors):
        return to_our_names(file)[1]
    try:
        tensors = encoder.translate(file.tensors)
    except Exception as error:  # they take for granted what they look for
        raise UserError(
            f"{file.path}: timm does not know it as weights of {encoder.name} ({reason_of(error)}); give a file of it"
        ) from error
    return RenamedWeights(tensors, {name: name for name in tensors}, [])


def init_from(model: Segmentor, path: str | Path) -> str:
    """Fine-tune a whole model of any format (`model.init_from`) to other classes or another crop -> a report line.

    Classifier and memory are dropped: they belong to the old classes and crop. All else must fit.
    """
    file = read_weights(path)
    _, found = to_our_names(file)
    own = model.state_dict()
    dropped = ("decoder.classifier.", "bottleneck.memory.")
    wanted = {name for name in own if not name.startswith(dropped)}
    if model.bottleneck is not None and not any(name.startswith("bottleneck.") for name in found.tensors):
        wanted = {name for name in wanted if not name.startswith("bottleneck.")}  # from a run without it: fresh
    kept = {name: tensor for name, tensor in found.tensors.items() if name in wanted}
    stays = {name: tensor for name, tensor in own.items() if name.startswith("bottleneck.memory.")}
    result = load_matching(model, RenamedWeights({**kept, **stays}, found.sources, []))
    if bad := [name for name in result.bad() if name in wanted]:
        raise UserError(
            f"{path}: does not fit this model; {len(bad)} of {len(wanted)} tensors are missing or of another size, "
            f"first {bad[0]} {tuple(own[bad[0]].shape)}; use the model.encoder, decoder and decoder_channels it was "
            f"trained with (weights of an encoder alone go to model.pretrained)"
        )
    check_finite(result.taken, file.path)
    fresh = sorted({name.rsplit(".", 1)[0] for name in own if name not in kept})
    return f"init_from {path}: took {len(kept)} tensors; fresh: {', '.join(fresh)}"


def load_pretrained(model: nn.Module, pretrained: str, init: str) -> list[str]:
    """What model.pretrained and model.init_from ask for; 'none': nothing. A missing file is an error."""
    reports = []
    if pretrained != "none":
        reports.append(load_encoder(model, pretrained))
    if init != "none":
        reports.append(init_from(model, init))
    return reports


# Into a model that the file itself describes, by its shapes


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a file say of its network. num_classes None: an encoder alone; crop_size None: no memory."""

    model: ModelConfig
    num_classes: int | None
    crop_size: int | None


@dataclass(frozen=True)
class RecognizedModel:
    """A file of a known format, its network with all weights that fit loaded, and how well they do."""

    file: WeightFile
    naming: KeyMap
    architecture: Architecture
    module: nn.Module  # a Segmentor, or the encoder alone
    result: LoadResult
    sources: Mapping[str, str]

    @property
    def leftovers(self) -> list[str]:
        return [name for name in self.result.unexpected if LEFTOVERS.fullmatch(name)]

    def state(self) -> dict[str, Tensor]:
        """The complete state_dict; UserError where something is missing, of another shape, or not finite."""
        if self.result.wrong:
            name, why = next(iter(self.result.wrong.items()))
            more = f" ({len(self.result.wrong)} tensors do not fit)" if len(self.result.wrong) > 1 else ""
            raise UserError(
                f"{self.file.path}: {name} {why} in a {self.architecture.model.encoder} like this{more}; "
                f"were two models mixed in it?"
            )
        if missing := self.result.missing:
            raise UserError(
                f"{self.file.path}: {len(missing)} tensors of this {self.architecture.model.encoder} are missing: "
                f"{abbreviate(missing)}; use the whole file (the encoder of a model with another head: model.pretrained)"
            )
        prefix = "encoder." if self.architecture.num_classes is None else ""
        taken = {prefix + name: tensor for name, tensor in self.result.taken.items()}
        check_finite(taken, self.file.path, self.sources)
        return self.module.state_dict()


def recognize(file: WeightFile, encoder_only: bool = False) -> RecognizedModel:
    """Format by keys, network by shapes; UserError for a format or network that is none of ours."""
    naming, found = to_our_names(file)
    if naming is None:
        known = "; ".join(dict.fromkeys(naming.title for naming in KEY_MAPS))
        raise UserError(
            f"{file.path}: holds no MiT encoder and no ResNet under any known naming ({known}); "
            f"its first names are {abbreviate(list(file.tensors), 3)}"
        )
    whole = any(name.startswith("decoder.") for name in found.tensors) and not encoder_only
    if not encoder_only:
        reject_published(file)
    architecture = infer_architecture(found.tensors, file.path, whole)
    if whole:
        module: nn.Module = build_model(architecture.model, architecture.num_classes, architecture.crop_size)
    else:
        module = ENCODERS[architecture.model.encoder](architecture.model.drop_path)
    result = load_matching(module, found, "" if whole else "encoder.")
    return RecognizedModel(file, naming, architecture, module, result, found.sources)


def reject_published(file: WeightFile) -> None:
    if any(name.startswith(PUBLISHED) for name in file.tensors):
        raise UserError(
            f"{file.path}: is one of the checkpoints that the authors of AllSpark published. They belong to another "
            f"architecture than the released code (patch embeddings and encoder layers in the bottleneck; no map_in, "
            f"map_out or memory), which nobody has described: https://github.com/xmed-lab/AllSpark/issues/3. "
            f"Its encoder can be used: model.pretrained={file.path}"
        )


def infer_architecture(tensors: Mapping[str, Tensor], path: Path, whole: bool) -> Architecture:
    """Variant, classes, decoder, heads and crop of tensors under our names."""
    encoder = find_encoder(tensors, path)
    if not whole:
        return Architecture(ModelConfig(encoder=encoder), None, None)
    num_classes, width = get_shape(tensors, "decoder.classifier.weight", 4, path)[:2]
    marks = {"decoder.convs.": "mlp_bn", "decoder.aspp.": "deeplab"}
    decoder = next((kind for mark, kind in marks.items() if any(name.startswith(mark) for name in tensors)), "mlp")
    bottleneck, crop = BottleneckConfig(name="none"), None
    if any(name.startswith("bottleneck.") for name in tensors):
        rows, columns = get_shape(tensors, "bottleneck.cross_branch.q.weight", 2, path)
        slots = get_shape(tensors, "bottleneck.memory.queue", 3, path)[2]
        side = math.isqrt(slots)
        if side**2 != slots or not slots:
            raise UserError(f"{path}: its memory holds maps of {slots} values, which is no square; the file is damaged")
        bottleneck = BottleneckConfig(name="allspark", num_heads=max(1, rows // max(1, columns)))
        crop = ENCODER_SIZES[encoder].strides[-1] * (side - 1) + 1  # the released code: side = crop // 32 + 1
    model = ModelConfig(encoder=encoder, decoder=decoder, decoder_channels=width, bottleneck=bottleneck)
    return Architecture(model, num_classes, crop)


def get_shape(tensors: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Sequence[int]:
    if name not in tensors:
        raise UserError(f"{path}: {name} is missing; use the whole file")
    if tensors[name].ndim != ndim:
        raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, must have {ndim} dimensions")
    return tensors[name].shape


def find_encoder(tensors: Mapping[str, Tensor], path: Path) -> str:
    """The name of the encoder with these widths and depths, of a ResNet with this stem, too."""
    stem = first_dim(tensors, "encoder.bn1.weight")
    if stem:
        kinds = {name: size for name, size in resnet.SIZES.items() if size.stem == stem}
        widths = tuple(first_dim(tensors, f"encoder.layer{stage}.0.conv3.weight") for stage in range(1, 5))
        blocks = (rf"encoder\.layer{stage}\.([0-9]+)\." for stage in range(1, 5))
    else:
        kinds = MIT_SIZES
        widths = tuple(first_dim(tensors, f"encoder.stages.{stage}.patch_embed.proj.weight") for stage in range(4))
        blocks = (rf"encoder\.stages\.{stage}\.blocks\.([0-9]+)\." for stage in range(4))
    depths = tuple(1 + max(numbers(tensors, pattern), default=-1) for pattern in blocks)
    for name, size in kinds.items():
        if (size.channels, size.depths) == (widths, depths):
            return name
    known = "; ".join(f"{name} {listed(size.channels)} and {listed(size.depths)}" for name, size in kinds.items())
    behind = f" behind a stem of {stem}" if stem else ""
    raise UserError(
        f"{path}: its stages are {listed(widths)} wide and {listed(depths)} blocks deep{behind}, which no encoder here "
        f"is ({known or 'a ResNet has a stem of 64 or 128'}); is the file whole, and of one model?"
    )


def first_dim(tensors: Mapping[str, Tensor], name: str) -> int:
    """The first size of a tensor; 0 where it is not in the file."""
    return len(tensors[name]) if name in tensors and tensors[name].ndim else 0


def numbers(names: Iterable[str], pattern: str) -> Iterable[int]:
    return (int(match[1]) for name in names if (match := re.match(pattern, name)))


def listed(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
