"""The configuration of a run: frozen dataclasses in which each key has its type, default, range and meaning.

config_io.py reads and writes them; `train.py --keys` describes them.
"released code: x" in a description: x is the value that reproduces the published code of the AllSpark paper.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

Mode = Literal["whole", "center_crop", "sliding_window"]
Windows = Literal["inside", "released"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Device = Literal["auto", "cuda", "mps", "cpu"]
MODES, WINDOWS, PRECISIONS, DEVICES = map(typing.get_args, (Mode, Windows, Precision, Device))
MAX = 2**31 - 1
MIN_SIDE = 32  # pixels; the smallest image the models accept
Size = int | tuple[int, int]  # side of a square, or height and width, in pixels


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size) -> str:
    """For messages: 513, or width x height as for images."""
    return str(size) if isinstance(size, int) else f"{size[1]} x {size[0]}"


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float = MAX,
    runtime: bool = False,
) -> Any:
    """A key of the configuration.

    Args:
        default: its default value; MISSING if it must be given.
        help: its meaning, in one sentence.
        low, high: inclusive bounds of a number, or of each number of a list; unbounded unless low or above is given.
        above: exclusive lower bound, in place of low.
        runtime: a resumed run may change the key, because it decides where and how a run executes
            (micro_batch also what batch norm, OHEM, CutMix and memory see, evaluation.interval which epochs can be the
            best).
    """
    return field(default=default, metadata={"help": help, "low": low, "above": above, "high": high, "runtime": runtime})


@dataclass(frozen=True, kw_only=True)
class CustomDataConfig:
    """A data set described in YAML alone."""

    classes: tuple[str, ...] = option(MISSING, "names of the classes, in the order of their indices")
    channels: int = option(
        3, "channels of the images; of three or more, the first three are red, green and blue", low=1, high=64
    )
    mean: tuple[float, ...] | None = option(
        None,
        "mean of each channel in 0..1 (not 0..255), for the normalization; null: ImageNet's, their average for further "
        "channels",
        low=0,
        high=1,
    )
    std: tuple[float, ...] | None = option(
        None, "standard deviation of each channel, in 0..1; null: as for mean", above=0, high=1
    )
    ignore_index: int = option(255, "mask value of pixels that are ignored")
    value_map: dict[int, int] | None = option(
        None, "stored mask value -> class index or ignore_index, e.g. {0: 0, 255: 1}"
    )
    color_map: dict[str, int] | None = option(
        None, 'for masks stored as RGB colors, instead of value_map: color -> class index, e.g. {"255,0,0": 1}'
    )
    image_max: int | None = option(
        None, "stored value of white in images with more than 8 bits, e.g. 4095 for 12 bits; null: 65535", low=1
    )
    orientation: Literal["shown", "stored"] | None = option(
        None,
        "masks fit photos as shown, turned by their EXIF orientation, or as stored; null: shown, unless the files "
        "contradict it",
    )
    palette: tuple[tuple[int, int, int], ...] | None = option(
        None,
        "RGB color of each class; black is transparent in overlays. null: those of color_map, else of PASCAL VOC, with "
        "black only for a background",
    )
    background: int | None = option(None, "index of the background class, if the data set has one")
    eval_mode: Mode = option("whole", "how images are evaluated unless evaluation.mode is set")
    labeled_images: str | None = option(None, "folder of labeled images, relative to data.data_root")
    labeled_masks: str | None = option(None, "folder of their masks, named <image name><mask_suffix>")
    mask_suffix: str = option(
        ".png", "what replaces the suffix of an image in the name of its mask, e.g. _mask.png for a.jpg and a_mask.png"
    )
    unlabeled_images: str | tuple[str, ...] | None = option(
        None, "folder of unlabeled images, or a list of folders; an absolute path may be anywhere"
    )
    val_images: str | None = option(None, "folder of validation images")
    val_masks: str | None = option(None, "folder of their masks")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset: str = option(MISSING, "name of the data set")
    data_root: str = option(
        MISSING, "folder of the data set; the environment variable ALLSPARK_DATA_<DATASET> overrides it", runtime=True
    )
    crop_size: Size = option(
        MISSING,
        "side of the training crops in pixels, or [height, width]; also the default size of the sliding window",
        low=64,
        high=2**14,
    )
    split: str | None = option(None, "name of the split: splits/<dataset>/<split>/{labeled,unlabeled}.txt")
    labeled_id_path: str | None = option(None, "list of labeled images, instead of a split")
    unlabeled_id_path: str | None = option(None, "list of unlabeled images, instead of a split")
    val_id_path: str | None = option(None, "list of validation images; null: splits/<dataset>/val.txt")
    allow_overlap: bool = option(False, "train although some labeled images are validation images, too", runtime=True)
    scale_range: tuple[float, float] = option(
        (0.5, 2.0), "smallest and largest factor of the random resize", low=0.01, high=100
    )
    num_workers: int | None = option(
        None,
        "loader processes per training process; null: one per core, at most 8; 0: load in the training process",
        low=0,
        high=1024,
        runtime=True,
    )
    horizontal_flip: bool = option(True, "mirror half of the training images left to right")
    vertical_flip: bool = option(False, "mirror half of the training images top to bottom, e.g. of aerial images")
    rotate_90: bool = option(False, "rotate training images by a random multiple of 90 degrees")
    color_strength: float = option(
        1.0,
        "factor on the ranges of the color jitter of strong views, except iMAS's; 1: as published, 0: no jitter",
        low=0,
        high=2,
    )
    photometric_probability: float = option(
        1.0,
        "probability that a strong view gets its photometric augmentation; otherwise it is a weak view",
        low=0,
        high=1,
    )
    photometric: Literal["cv2", "pil"] = option(
        "cv2", "implementation of the photometric augmentation; cv2 is six times faster, a few gray levels off"
    )
    cache: str = option(
        "none", "folder for decoded, memory-mapped training images; none: decode images each time", runtime=True
    )
    on_bad_sample: Literal["error", "skip"] = option(
        "error", "what to do with an unreadable training file: stop, or use another sample instead", runtime=True
    )
    timeout: float = option(
        600.0, "seconds without a batch from the loader after which the run stops", low=1, high=1e6, runtime=True
    )
    custom: CustomDataConfig | None = None


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    name: Literal["none", "allspark"] = option("none", "bottleneck between encoder and decoder")
    place: Literal["pyramid", "tokens"] = option(
        "pyramid",
        "on a plain ViT: after its pyramid, on the deepest map, or before it, on the last tokens; decoder=dpt has no "
        "pyramid: always on the tokens",
    )
    warmup_epochs: int | None = option(
        5, "epochs before the memory is read; every step after the burn-in writes to it; null: it is never read", low=0
    )
    num_heads: int = option(2, "attention heads", low=1, high=64)
    dropout: float = option(0.1, "dropout rate of the bottleneck", low=0, high=0.99)
    grouping_input: Literal["logits", "probabilities", "random"] = option(
        "logits",
        "prediction that assigns channels to classes; released code: logits; random (for ablations): as logits, then "
        "shuffled among the channels",
    )
    context: Literal["unlabeled", "labeled"] = option(
        "unlabeled",
        "images whose channels labeled images attend to; labeled (for ablations): those in the memory or, until it is "
        "read, in the batch",
    )
    empty_slots: bool = option(True, "let memory slots that were never written enter the softmax; released code: true")
    own_channels: bool = option(
        False, "reconstruct every second labeled image from its own channels, as in inference; released code: false"
    )
    attention: Literal["both", "cross", "none"] = option(
        "both", "for ablations: attention in both branches, in the labeled branch alone, or in neither"
    )
    skip: bool = option(False, "add the input to the output; the bottleneck's own output is initialized to zero")
    memory_policy: Literal["rank0", "gather", "local"] = option(
        "rank0",
        "which features enter the memory: rank0 (released code): those of rank 0; gather: of all ranks; "
        "local: each rank keeps its own",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    encoder: str = option(
        "mit_b5",
        "mit_b0 to mit_b5, resnet50, resnet101, resnet50s, resnet101s (and with _imas, _imas_os8: iMAS's dilations), "
        "dinov2_small, _base, _large, _giant, or timm:<name>",
    )
    decoder: Literal["mlp", "mlp_bn", "deeplab", "dpt"] = option(
        "mlp",
        "mlp: SegFormer's; mlp_bn: mmsegmentation's, with a batch norm per level; deeplab: DeepLabV3+; dpt: UniMatch "
        "V2's, only for plain ViTs",
    )
    decoder_channels: int | None = option(
        None,
        "width of the decoder; null: 256, 768 for mit_b2 to mit_b5 as in SegFormer, and that of UniMatch V2 for dpt",
        low=1,
        high=2**14,
    )
    fit: Literal["pad", "resize"] = option(
        "pad",
        "how timm's and DINOv2's networks take an image whose sides are not multiples of their stride: padded, or "
        "resized to the nearest multiples as in UniMatch V2",
    )
    drop_path: float = option(0.1, "stochastic depth rate of the encoder", low=0, high=0.99)
    dropout: float = option(0.1, "dropout rate before the classifier", low=0, high=0.99)
    pretrained: str = option("none", "path of encoder weights, or none")
    init_from: str = option("none", "path of a checkpoint to fine-tune, or none")
    checkpointing: bool = option(
        False, "recompute the encoder's activations in the backward pass: less memory, slower", runtime=True
    )
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["sgd", "adamw"] = option("sgd", "optimizer")
    lr: float = option(0.001, "learning rate of the encoder", above=0)
    lr_multi: float = option(10.0, "factor on the learning rate of everything but the encoder", low=0, high=1e6)
    freeze: Literal["none", "encoder"] | int = option(
        "none",
        "what is not trained: nothing, the encoder, or all of it before block N + 1; frozen batch norm uses running "
        "statistics",
    )
    layer_decay: float = option(
        1.0,
        "factor on the encoder's learning rate from each block to the one before it, 0.65 to 0.9 for ViTs; 1: none",
        above=0,
        high=1,
    )
    momentum: float = option(0.9, "momentum of SGD", low=0, high=0.9999)
    weight_decay: float = option(1e-4, "weight decay of all parameters", low=0, high=1e3)
    power: float = option(0.9, "exponent of the poly schedule lr * (1 - step / total) ** power", low=0, high=100)
    warmup_steps: int = option(0, "steps of linear learning-rate warm-up from 0 to the schedule's rate", low=0)
    lr_scaling: Literal["none", "linear"] = option("none", "linear: scale the learning rate by batch_size / lr_batch")
    lr_batch: int | None = option(
        None, "batch_size that lr is meant for; null: the batch_size of the recipe's files", low=1
    )
    lr_one_step_late: bool = option(
        False, "set the learning rate after the step, so that step k uses the rate of step k - 1; released code: true"
    )
    clip_norm: float | None = option(None, "maximum norm of the gradient; null: no clipping", low=1e-6, high=1e9)
    max_skipped: int = option(
        20,
        "consecutive steps with a non-finite gradient after which the run stops; fp16 begins with up to 16",
        low=1,
        runtime=True,
    )


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    name: Literal["ce", "ohem"] = option("ce", "labeled loss: cross-entropy, or that of the hardest pixels alone")
    thresh: float = option(0.7, "OHEM: pixels whose true class has a probability below this are hard", low=0, high=1)
    min_kept: int = option(
        200_000, "OHEM: minimum number of pixels used in a forward pass; 0: all pixels, as released", low=0
    )
    min_kept_images: int | None = option(
        None, "OHEM: number of images that min_kept refers to; scaled in proportion for others; null: not scaled", low=1
    )
    class_weights: tuple[float, ...] | None = option(None, "cross-entropy: a weight per class")
    dice: float = option(0.0, "weight of an additional Dice loss, which counts each class equally", low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    mode: Mode | None = option(None, "how an image is evaluated; null: the data set's default")
    window: Size | None = option(
        None, "side, or [height, width], of the sliding window or center crop; null: data.crop_size", low=32, high=2**14
    )
    windows: Windows = option(
        "inside",
        "the last sliding windows; inside: shifted so that all have full size; released: cut off at the border",
    )
    interval: int = option(1, "epochs between evaluations; the last epoch is always evaluated", low=1, runtime=True)
    patience: int | None = option(
        None,
        "epochs without a better mIoU on val after which the run ends (early stopping; the learning rate still follows "
        "`epochs`); >= evaluation.interval; null: never",
        low=1,
    )
    pictures: int = option(
        4,
        "number of validation images, and of unlabeled ones, that the log writers show with their predictions",
        low=0,
        high=1000,
        runtime=True,
    )
    pseudo_labels: int = option(
        64, "unlabeled images with known labels on which the quality of pseudo-labels is measured", low=0, runtime=True
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval: int = option(10, "steps between log lines", low=1, runtime=True)
    writers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = option(
        ("tensorboard",), "where metrics and images go, in addition to metrics.jsonl", runtime=True
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The options are given beside the name: method: {name: fixmatch, threshold: 0.95}."""

    name: str = option(MISSING, "name of the method, or package.module:Class")
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result of a run, plus device, workers and intervals.

    notes: what was translated from old keys when it was read; not a key.
    """

    data: DataConfig
    model: ModelConfig
    method: MethodConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    criterion: CriterionConfig = field(default_factory=CriterionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    epochs: int = option(MISSING, "number of training epochs", low=1)
    epoch_of: Literal["unlabeled", "labeled"] = option("unlabeled", "list of which one pass is an epoch")
    batch_size: int = option(8, "labeled images per step over all processes, with as many unlabeled images", low=1)
    micro_batch: int | None = option(
        None,
        "labeled images per forward pass of a process, the rest by gradient accumulation; null: its whole share",
        low=1,
        runtime=True,
    )
    burn_in_epochs: int = option(0, "epochs of supervised training at the start", low=0)
    seed: int = option(0, "seed of all random numbers", low=0)
    device: Device = option("auto", "device to train on; auto: a GPU if there is one", runtime=True)
    checkpoint_interval: int = option(
        0, "steps between checkpoints inside an epoch; 0: none after a number of steps", low=0, runtime=True
    )
    checkpoint_minutes: float = option(
        30.0, "minutes after which a checkpoint is saved inside an epoch; 0: never", low=0, high=1e6, runtime=True
    )
    deterministic: bool = option(
        False, "use deterministic algorithms, and stop with an error where there is none; slower on a GPU"
    )
    precision: Precision = option("fp32", "precision of the forward and backward pass; weights are always float32")
    compile: bool = option(
        False, "compile encoder and decoder with torch.compile, which takes a minute or more", runtime=True
    )
    cuda_graph: bool = option(
        True,
        "capture and replay each training step as a CUDA graph where the method supports it; removes launch overhead",
        runtime=True,
    )
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
