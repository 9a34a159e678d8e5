"""allspark export: a checkpoint -> one file that predicts without this code, for torch.export or ONNX."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from allspark import inference as loading
from allspark.config import Size, height_width
from allspark.config_io import to_plain, without_absolute_paths
from allspark.data.batch import normalize
from allspark.data.spec import IMAGENET, Statistics
from allspark.evaluation.sliding_window import Inference, predict_sliding
from allspark.models.segmentor import Segmentor, SegOutput
from allspark.utils.atomic import atomic_path
from allspark.utils.errors import UserError, reason_of

ONNX_LIMIT = 2**31 - 2**24  # bytes of weights; a file has at most 2 GiB
Run = Callable[[Tensor], Tensor]  # images (B, 3, H, W) uint8 -> logits (B, K, H, W)

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
NEEDS = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
MIN_SIDE = 64  # torch.export assumes that no feature map shrinks to a single cell
EXAMPLE = (2, 97, 161)  # batch, height, width of the traced input; all differ so that none is taken for another
CHECKED = ((1, 64, 64), (3, 66, 97), (1, 224, 224), (1, 300, 190), (2, 129, 352))  # batch, height, width
WINDOWED = (150, 210)  # height and width of the image that is predicted in sliding windows
TOLERANCE = 1e-4  # relative to the largest logit, at least to 1


def main(args: argparse.Namespace) -> None:
    check_arguments(args.format, args.out, args.force)
    loaded = loading.load_for_inference(args.checkpoint, torch.device("cpu"), args.dataset, args.best)
    network = Exported(loaded.model, loaded.spec.statistics).eval()
    with quiet():
        program = trace(network)
    about = metadata(loaded)
    with atomic_path(args.out, errors=(RuntimeError,)) as temporary, quiet():
        {"torch": save_torch, "onnx": save_onnx}[args.format](program, temporary, about)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        run = {"torch": open_torch, "onnx": open_onnx}[args.format](temporary)
        print(verify(run, network, loaded.crop_size or loading.ANY_CROP, args.out))
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {size:.1f} MiB; {about['input']} -> logits of {len(about['classes'])} classes")


def check_arguments(form: str, out: Path, force: bool) -> None:
    """UserError if the file cannot be written, before anything is computed."""
    if out.is_dir() or out.suffix != SUFFIXES[form]:
        raise UserError(f"--out {out}: must name a file that ends in {SUFFIXES[form]} for --format {form}")
    if out.exists() and not force:
        raise UserError(f"--out {out}: already exists; choose another name or overwrite it with --force")
    if missing := [name for name in NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Exported(nn.Module):
    """Images (B, C, H, W), uint8 -> logits (B, K, H, W), float32. No image depends on another."""

    def __init__(self, model: Segmentor, statistics: Statistics = IMAGENET) -> None:
        super().__init__()
        self.statistics = statistics
        self.model = model.inference_copy()

    def forward(self, image: Tensor) -> Tensor:
        return self.model(normalize(image, self.statistics)).logits


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and log messages of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(network: Exported) -> ExportedProgram:
    """The network as a program with dynamic batch, height and width; UserError if torch cannot trace it."""
    batch, height, width = EXAMPLE
    example = torch.zeros(batch, len(network.statistics.mean), height, width, dtype=torch.uint8)
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # torch raises many types
        raise UserError(
            f"torch {torch.__version__} cannot export this network ({reason_of(error)}); try another encoder or "
            "version of torch"
        ) from error
    # The trace also records which inner maps differ in size for the example. Nothing depends on that, as verify()
    # shows, but newer versions of torch would reject images for which a side happens to be a multiple of the stride.
    if hasattr(program, "_guards_code"):
        program._guards_code = []
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # with the paths of this machine's files
    return program


def metadata(loaded: loading.InferenceModel) -> dict[str, Any]:
    """What a user of the file needs to know, as plain values."""
    channels, inference = loaded.spec.channels, {"mode": loaded.spec.eval_mode, "window": loaded.crop_size}
    if loaded.recipe is not None:
        chosen = loaded.inference()
        inference = {"mode": chosen.mode, "window": chosen.window, "windows": chosen.windows}
    return {
        "classes": list(loaded.spec.classes),
        "palette": [list(map(int, color)) for color in loaded.spec.palette],
        "input": f"image: uint8 {'RGB ' * (channels == 3)}(batch, {channels}, height, width)",
        "channels": channels,
        "image_max": loaded.spec.reading.image_max,
        "orientation": loaded.spec.reading.orientation or "shown",
        "output": "logits: float32 (batch, class, height, width); the class with the largest logit is predicted",
        "min_side": MIN_SIDE,
        "evaluated": inference,
        "dataset": loaded.spec.name,
        "model": without_absolute_paths(to_plain(loaded.recipe.model)) if loaded.recipe is not None else None,
        "checkpoint_sha256": loaded.meta["sha256"],
    }


def save_torch(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(about)})


def open_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def save_onnx(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """One file, with the operator set that this version of torch writes by default."""
    import onnx

    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise UserError(f"{size / 2**30:.1f} GiB of weights; an ONNX file holds less than 2 GiB, use --format torch")
    try:
        names = {"input_names": ["image"], "output_names": ["logits"]}
        proto = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    except Exception as error:  # torch raises many types
        raise UserError(
            f"torch {torch.__version__} cannot write this network as ONNX ({reason_of(error)}); try --format torch"
        ) from error
    del proto.graph.value_info[:]  # inner sizes, in terms of the symbols renamed below
    for value in (*proto.graph.input, *proto.graph.output):
        for index, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[index].dim_param = name
    onnx.helper.set_model_props(proto, {key: as_text(value) for key, value in about.items()})
    onnx.save(proto, path)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@torch.no_grad()
def verify(run: Run, network: Exported, window: Size, out: Path) -> str:
    """Compare the file with the network on whole images and windows.

    Returns:
        A summary of the differences.

    Raises:
        UserError: they exceed TOLERANCE.
    """
    generator, channels = torch.Generator().manual_seed(0), len(network.statistics.mean)
    whole, largest = 0.0, 1.0
    for batch, height, width in CHECKED:
        image = torch.randint(256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)
        want, got = network(image), run_exported(run, image, out)
        whole, largest = max(whole, float((want - got).abs().max())), max(largest, float(want.abs().max()))
    image = torch.randint(256, (1, channels, *WINDOWED), dtype=torch.uint8, generator=generator)
    side = min(max(*height_width(window), MIN_SIDE), min(WINDOWED) - 1)  # several windows of one size
    inference = Inference("sliding_window", side)
    parts = [predict_sliding(lambda x, f=f: SegOutput(f(x)), image, inference) for f in (network, run)]
    windows = float((parts[0] - parts[1]).abs().max())
    if not (whole <= TOLERANCE * largest and windows <= TOLERANCE):  # NaN is not
        raise UserError(
            f"{out}: not written: its logits differ from the network's by {whole:.1e} of {largest:.1f}, probabilities "
            f"in windows by {windows:.1e}, tolerance {TOLERANCE:.0e}; this network cannot be exported for all sizes"
        )
    sizes = ", ".join(f"{height} x {width}" for _, height, width in CHECKED)
    return (
        f"checked: logits differ by at most {whole:.1e} (the largest is {largest:.1f}) on images of {sizes}, "
        f"probabilities in windows of {side} by {windows:.1e}"
    )


def run_exported(run: Run, image: Tensor, out: Path) -> Tensor:
    try:
        return run(image)
    except Exception as error:  # of onnxruntime or torch
        raise UserError(
            f"{out}: not written: it does not accept images of {tuple(image.shape)} ({reason_of(error)}); this network "
            "cannot be exported for all sizes"
        ) from error
