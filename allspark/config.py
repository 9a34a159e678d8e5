"""Recipes: strict frozen dataclasses filled from YAML and `key.path=value`. Nothing here knows what the values do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allspark.ranges import check_ranges
from allspark.utils.errors import UserError, short_repr
from allspark.utils.safe_yaml import parse_yaml

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "configs").is_dir()  # a wheel holds configs, splits, train.py and eval.py inside the package
CONFIG_ROOT = (PACKAGE if INSTALLED else PACKAGE.parent) / "configs"  # the others lie beside it

Mode = Literal["whole", "center_crop", "sliding_window"]  # of evaluation: how an image is put to the model
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Device = Literal["auto", "cuda", "mps", "cpu"]
MODES, PRECISIONS, DEVICES = map(typing.get_args, (Mode, Precision, Device))


@dataclass(frozen=True, kw_only=True)
class CustomDataConfig:
    """A data set described in YAML alone. Folders are relative to data_root; a mask has its image's name, as .png."""

    classes: tuple[str, ...]
    ignore_index: int = 255
    value_map: dict[int, int] | None = None  # stored value -> class index or ignore_index, e.g. {0: 0, 255: 1}
    color_map: dict[str, int] | None = None  # masks stored as colours, in place of value_map, e.g. {"255,0,0": 1}
    palette: tuple[tuple[int, int, int], ...] | None = None
    background: int | None = None  # index of the class of all that belongs to no other one, where there is one
    eval_mode: Mode = "whole"
    labeled_images: str | None = None
    labeled_masks: str | None = None
    unlabeled_images: str | None = None
    val_images: str | None = None
    val_masks: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset: str
    data_root: str
    crop_size: int
    split: str | None = None  # splits/<dataset>/<split>/{labeled,unlabeled}.txt
    labeled_id_path: str | None = None  # lists given by hand instead of a split
    unlabeled_id_path: str | None = None
    val_id_path: str | None = None  # default: splits/<dataset>/val.txt
    scale_range: tuple[float, float] = (0.5, 2.0)  # of the long side, for the random resize
    num_workers: int | None = None  # per process; None: one for each core, at most 8; 0: load in the training process
    photometric_probability: float = 1.0  # that a view is what its policy makes, else it is the weak one
    photometric: Literal["cv2", "pil"] = "cv2"  # cv2: six times faster, a few grey levels off: data/transforms.py
    cache: str = "none"  # folder for the training images, decoded once and memory-mapped; none: decode each time
    on_bad_sample: Literal["error", "skip"] = "error"  # a training file that cannot be read; skip: another in its place
    timeout: float = 600.0  # seconds without a batch from the workers, then the storage counts as hung
    custom: CustomDataConfig | None = None


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    name: Literal["none", "allspark"] = "none"
    num_heads: int = 2
    dropout: float = 0.1
    grouping_input: Literal["logits", "probabilities"] = "logits"  # Released: logits, never softmaxed
    empty_slots: bool = True  # Released: noise that was never written over takes part in the softmax
    own_channels: bool = False  # every second labeled image is rebuilt as in inference. Released: false
    attention: Literal["both", "cross", "none"] = "both"  # ablations: in both branches, in the labeled one, in neither
    skip: bool = False  # the map that comes in is added to what comes out, which is 0 when training begins
    memory_policy: Literal["rank0", "gather", "local"] = "rank0"  # Released: rank0, by DDP's buffer broadcast


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    encoder: str = "mit_b5"  # mit_b0 to mit_b5, resnet50, resnet101, or a model of timm: timm:convnext_tiny
    decoder: Literal["mlp", "mlp_bn", "deeplab"] = "mlp"  # mlp_bn: mmsegmentation's, a batch norm per level
    decoder_channels: int | None = None  # None: 256; for mit_b2 to mit_b5 768 (SegFormer, table 6)
    drop_path: float = 0.1  # published for MiT; for ResNets 0
    dropout: float = 0.1  # before the classifier
    pretrained: str = "none"  # path of encoder weights, or none
    init_from: str = "none"  # path of a trained checkpoint to fine-tune, or none
    checkpointing: bool = False  # activations of the encoder are made again in the backward pass: less memory, slower
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001  # of the encoder
    lr_multi: float = 10.0  # everything else: lr * lr_multi
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9  # poly schedule (1 - step / total) ** power
    lr_scaling: Literal["none", "linear"] = "none"  # linear: lr * batch_size / lr_batch
    lr_batch: int | None = None  # batch_size that lr is meant for; None: that of the recipe's files
    late: bool = False  # Released: the rate is set after the step, so step k runs with the rate of k - 1
    clip_norm: float | None = None  # largest norm of the gradient
    max_skipped: int = 20  # steps in a row without a finite gradient, then the run stops; fp16 begins with up to 16


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    name: Literal["ce", "ohem"] = "ce"
    thresh: float = 0.7
    min_kept: int = 200_000  # per process, as released
    class_weights: tuple[float, ...] | None = None  # of ce, one for each class, for classes that are rare
    dice: float = 0.0  # weight of a Dice loss that is added: an area counts by its class's size, not by pixels


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    mode: Mode | None = None  # None: the data set's own
    window: int | None = None  # side of the window or center crop; None: the training crop
    interval: int = 1  # epochs between evaluations; the last epoch is always evaluated
    pictures: int = 4  # of val, and of unlabeled images with their pseudo-labels, for TensorBoard
    pseudo_labels: int = 64  # unlabeled images whose label the list names, to measure pseudo-labels on and no more


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    name: str
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the method's constructor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's result, plus device, workers and intervals."""

    data: DataConfig
    model: ModelConfig
    method: MethodConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    criterion: CriterionConfig = field(default_factory=CriterionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    epochs: int
    epoch_of: Literal["unlabeled", "labeled"] = "unlabeled"  # whose list is seen once per epoch
    batch_size: int = 8  # labeled images per step over all processes; as many unlabeled
    micro_batch: int | None = None  # of them at once in a process, the rest by gradient accumulation; None: its share
    burn_in_epochs: int = 0  # epochs of the supervised start, with the labeled loss alone
    seed: int = 0
    device: Device = "auto"
    log_interval: int = 10  # steps
    checkpoint_interval: int = 0  # steps between checkpoints inside an epoch; 0: none; each epoch ends with one anyway
    checkpoint_minutes: float = 30.0  # minutes after which one is due inside an epoch; 0: none
    deterministic: bool = False  # algorithms that give the same bits again, where there are such; slower on a GPU
    precision: Precision = "fp32"  # of forward and backward pass; weights are float32
    compile: bool = False  # encoder and decoder by torch.compile: a minute or more at the start


MAPS = ("value_map", "color_map")  # what is given of one is all of it; a section is updated key by key
# What a resumed run may change: it decides where and how a run happens, not what comes out.
RUN_KEYS = (
    "data.data_root",
    "data.num_workers",
    "data.cache",
    "data.timeout",
    "data.on_bad_sample",  # the remedy for a run that met one
    "device",
    "log_interval",
    "checkpoint_interval",
    "checkpoint_minutes",
    "optim.max_skipped",
    "evaluation.interval",
    "evaluation.pseudo_labels",
    "evaluation.pictures",
    "model.checkpointing",
    "micro_batch",  # as the number of processes, which is no part of a recipe
    "compile",
)


def load_recipe(dataset: str, method: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """configs/datasets/<dataset>.yaml, configs/methods/<method>.yaml, its section `datasets: <dataset>:`, overrides."""
    content = _with_method(read_yaml(_find("datasets", dataset)), dataset, method)
    return build_recipe(content, overrides, f"--dataset {dataset} --method {method}")


def _with_method(content: Mapping[str, Any], dataset: str, method: str) -> dict[str, Any]:
    """content updated by the method's file and its section for the data set; before both by the file of its `base`."""
    path = _find("methods", method)
    own = read_yaml(path)
    if (base := own.pop("base", None)) is not None:
        if base == method:
            raise UserError(f"{path}: base={base!r} names the file itself")
        content = _with_method(content, dataset, str(base))
    sections = own.pop("datasets", None) or {}
    if not isinstance(sections, Mapping):
        raise UserError(f"{path}: datasets={short_repr(sections)} must be a section of data set names")
    for name in sections:
        _find("datasets", str(name))
    special = sections.get(dataset) or {}
    if not isinstance(special, Mapping):
        raise UserError(f"{path}: datasets.{dataset}={short_repr(special)} must be a section of keys")
    return merge(merge(content, own), special)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None, method: str | None = None) -> Recipe:
    """A whole recipe from one file, such as the config.yaml that a run writes.

    method: that of configs/methods/<method>.yaml, with all the file sets, in place of the recipe's own and bottleneck.
    """
    content = read_yaml(Path(path))
    if method is not None:
        data, model = content.get("data"), content.get("model")
        content = {key: value for key, value in content.items() if key != "method"}
        if isinstance(model, Mapping):
            content["model"] = {key: value for key, value in model.items() if key != "bottleneck"}
        content = _with_method(content, str(data.get("dataset")) if isinstance(data, Mapping) else "", method)
    return build_recipe(content, overrides, str(path))


def build_recipe(content: Mapping[str, Any], overrides: Mapping[str, Any] | None, source: str) -> Recipe:
    """Fill the dataclasses; every unknown key, missing key or wrong type is an error that names the key's full path."""
    given = {full_key(key): value for key, value in (overrides or {}).items()}
    stated = content.get("batch_size") if isinstance(content, Mapping) else None
    for key, value in given.items():
        content = merge(content, _nest(key, value))
    recipe = _with_lr_batch(_convert(content, Recipe, "", source), stated)
    root = os.environ.get(root_variable(recipe.data.dataset))
    if root and "data.data_root" not in given:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, data_root=root))
    check_ranges(recipe, source)
    return recipe


def _with_lr_batch(recipe: Recipe, stated: Any) -> Recipe:
    """optim.lr_batch, where it is needed and not given: the batch_size of the files, before any override."""
    if recipe.optim.lr_scaling == "none" or recipe.optim.lr_batch is not None:
        return recipe
    lr_batch = recipe.batch_size if stated is None else _convert(stated, int, "batch_size", "the recipe")
    return dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr_batch=lr_batch))


def root_variable(dataset: str) -> str:
    """The environment variable that names the root of a data set."""
    return "ALLSPARK_DATA_" + re.sub(r"\W", "_", dataset.upper())


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """`key.path=value` words of a command line; the value is YAML."""
    overrides = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"'{item}': not understood; overrides are written key.path=value, e.g. optim.lr=0.01")
        try:
            overrides[key] = parse_yaml(value)
        except ValueError as error:
            raise UserError(f"{' '.join(item.split())[:200]}: the value is not YAML ({str(error)[:200]})") from error
    return overrides


def full_key(key: str) -> str:
    """The whole path of a key given by its last part, where only one key ends so: lr -> optim.lr."""
    paths = [path for path in _key_paths(Recipe) if path == key or path.endswith(f".{key}")]
    exact = [path for path in paths if path == key]
    if key.startswith("method.") or exact or not paths:
        return key
    if len(paths) > 1:
        raise UserError(f"{key}: ambiguous, write one of {', '.join(paths)}")
    return paths[0]


def _key_paths(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(kind).items():
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from _key_paths(part, f"{prefix}{name}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, by safe_load."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML recipe") from error
    except ValueError as error:  # no UTF-8, or no YAML
        raise UserError(f"{path}: not valid YAML: {str(error)[:300]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, must be a mapping of keys to values")
    return content


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key, everything else replaced. A bare name updates the `name` of a section: criterion: ohem."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"name": old}
        if isinstance(old, Mapping) and isinstance(value, str):
            value = {"name": value}
        sections = isinstance(old, Mapping) and isinstance(value, Mapping) and key not in MAPS
        merged[key] = merge(old, value) if sections else value
    return merged


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as dicts and lists of plain values: what config.yaml and checkpoints hold, and build_recipe reads."""

    def plain(value: Any) -> Any:
        if isinstance(value, MethodConfig):
            return {"name": value.name, **plain(value.options)}
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(recipe)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two plain recipes differ and that may change a result, as 'key: old -> new'."""
    found = []
    for key in sorted({*old, *new}, key=str):  # those of a value_map are numbers
        path, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}.")
        elif a != b and path not in RUN_KEYS:
            found.append(f"{path}: {a} -> {b}")
    return found


def bind_options(function: Callable[..., Any], options: Mapping[str, Any], path: str) -> dict[str, Any]:
    """All keyword-only arguments of a constructor: those given, checked against their type hints, and the defaults."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise UserError(f"{path}.{key}: unknown option; there is {', '.join(known) or 'none'}")
    given = {key: _convert(value, hints[key], f"{path}.{key}", "recipe") for key, value in options.items()}
    return {name: given.get(name, p.default) for name, p in known.items()}


def _find(folder: str, name: str) -> Path:
    path = CONFIG_ROOT / folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"--{folder.removesuffix('s')} {name}: there is no {path}; known are {known}")
    return path


def _nest(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert(value: Any, hint: Any, path: str, source: str) -> Any:
    """A YAML value as the hinted type, or a UserError with the key's path."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _convert_section(value, hint, path, source)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), path, source)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_convert(item, kind, path, source) for item, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, Mapping):
        pairs = ((_convert(k, args[0], path, source), v) for k, v in value.items())
        return {key: _convert(item, args[1], f"{path}.{key}", source) for key, item in pairs}
    if hint is float and not isinstance(value, bool):  # YAML 1.1 reads 6e-4 as a string
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return float(value)
    if hint in (int, bool, str) and type(value) is hint and is_usable(value):
        return value
    if type(value) is hint:
        raise UserError(
            f"{source}: {path}={short_repr(value)} holds what no file can: give a number of 64 bits, or plain text"
        )
    misread = hint is str and isinstance(value, bool)
    remedy = "; YAML reads yes, no, on and off as true or false: put it in quotes" if misread else ""
    raise UserError(f"{source}: {path}={short_repr(value)} is {type(value).__name__}, must be {_worded(hint)}{remedy}")


def _worded(hint: Any) -> str:
    """What YAML has for a type: int, ce or ohem, [str, ...], [[int, int, int], ...], {int: int}."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else _worded(arg) for arg in args)}]"
    if origin is dict:
        return f"{{{_worded(args[0])}: {_worded(args[1])}}}"
    return hint.__name__


def is_usable(value: int | bool | str) -> bool:
    """Whether a file can hold it, and a file name: no half of a surrogate pair, no NUL, no number without end."""
    if isinstance(value, str):
        return "\0" not in value and not re.search("[\ud800-\udfff]", value)
    return abs(value) < 2**63


def _convert_section(value: Any, kind: type, path: str, source: str) -> Any:
    hints = _hints(kind)
    if isinstance(value, str) and "name" in hints:
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {path or 'the recipe'}={short_repr(value)} must be a section of keys")
    if kind is MethodConfig:  # its options stand beside the name; the method itself checks them (bind_options)
        value = {"name": value.get("name"), "options": {k: v for k, v in value.items() if k != "name"}}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            places = {p.rpartition(".")[2]: p for p in _key_paths(Recipe)} | {name: prefix + name for name in hints}
            close = difflib.get_close_matches(str(key), places, 1)
            remedy = f"did you mean {places[close[0]]}?" if close else f"known here: {', '.join(hints)}"
            raise UserError(f"{source}: {prefix}{key}: unknown key; {remedy}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in value:
            raise UserError(f"{source}: {prefix}{entry.name} is missing; it has no default")
    return kind(**{key: _convert(item, hints[key], prefix + key, source) for key, item in value.items()})
