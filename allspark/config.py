"""Recipes: strict frozen dataclasses filled from YAML and `key.path=value`. Nothing here knows what the values do."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIG_ROOT = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class CustomDataConfig:
    """A data set described in YAML alone: the folders are relative to data_root; masks carry the image's name, as .png."""

    classes: tuple[str, ...]
    ignore_index: int = 255
    value_map: dict[int, int] | None = None  # stored value -> class index or ignore_index, e.g. {0: 0, 255: 1}
    palette: tuple[tuple[int, int, int], ...] | None = None
    eval_mode: Literal["whole", "center_crop", "sliding_window"] = "whole"
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
    scale_range: tuple[float, float] = (0.5, 2.0)
    num_workers: int = 2  # per process
    custom: CustomDataConfig | None = None


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    name: Literal["none", "allspark"] = "none"
    num_heads: int = 2
    dropout: float = 0.1
    grouping_input: Literal["logits", "probabilities"] = "logits"  # Released: logits, never softmaxed
    empty_slots: bool = True  # Released: True, slots that were never written take part as noise
    memory_policy: Literal["rank0", "gather", "local"] = "rank0"  # Released: rank0, by DDP's buffer broadcast


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    encoder: str = "mit_b5"
    decoder_channels: int | None = None  # None: 256 for mit_b0 and mit_b1, 768 for the others (SegFormer, table 6)
    drop_path: float = 0.1
    dropout: float = 0.1  # before the classifier
    pretrained: str = "none"  # path of encoder weights, or none
    init_from: str = "none"  # path of a trained checkpoint to fine-tune, or none
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001  # of the encoder
    lr_multi: float = 10.0  # everything else: lr * lr_multi
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9  # poly schedule (1 - step / total) ** power
    late: bool = False  # Released: the rate is set after the step, so step k runs with the rate of k - 1


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    name: Literal["ce", "ohem"] = "ce"
    thresh: float = 0.7
    min_kept: int = 200_000  # per process, as released


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    mode: Literal["whole", "center_crop", "sliding_window"] | None = None  # None: the data set's own
    window: int | None = None  # side of the window or center crop; None: the training crop
    interval: int = 1  # epochs between evaluations; the last epoch is always evaluated


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
    burn_in_epochs: int = 0  # epochs of the supervised start, with the labeled loss alone
    seed: int = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    log_interval: int = 10  # steps
