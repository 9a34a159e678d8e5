"""bench eval: sliding windows, a whole image, labels from scores, pixel counts; ours and the plain implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from allspark.bench.measure import Row, Side, measure
from allspark.bench.plain import PlainSegmentor, plain_copy, plain_counts, plain_label, plain_sliding
from allspark.config import BottleneckConfig, ModelConfig
from allspark.data.batch import normalize
from allspark.data.spec import IGNORE_INDEX, DatasetSpec, voc_palette
from allspark.engine.onednn import torch_kernels
from allspark.engine.stepper import autocast
from allspark.evaluation.evaluate import predict
from allspark.evaluation.metrics import ConfusionMatrix
from allspark.evaluation.sliding_window import Inference
from allspark.models.segmentor import build_model


@dataclass(frozen=True)
class EvalCase:
    """Model, size of the image, and side of the windows."""

    encoder: str = "mit_b0"
    height: int = 1024
    width: int = 2048
    window: int = 801
    classes: int = 19

    @property
    def spec(self) -> DatasetSpec:
        names = tuple(f"class {k}" for k in range(self.classes))
        return DatasetSpec("bench", names, voc_palette(self.classes))


def bench_eval(case: EvalCase, precisions: Sequence[str], repeats: int, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    cfg = ModelConfig(encoder=case.encoder, bottleneck=BottleneckConfig(name="allspark"))
    model = build_model(cfg, case.classes, case.window).to(device).eval()
    plain = plain_copy(model, cfg).eval()
    image = torch.randint(0, 256, (1, 3, case.height, case.width), dtype=torch.uint8)
    size = f"{case.width}x{case.height}, {case.classes} classes"

    def ours(inference: Inference) -> list[Side]:
        def side(precision: str) -> Side:
            def run() -> None:
                with autocast(precision, device):
                    predict(model, image, case.spec, device, inference, ["bench"])

            return Side("ours", run, precision)

        return [side(precision) for precision in precisions]

    def plainly(label: Callable[[PlainSegmentor, Tensor], Tensor]) -> Side:
        return Side("plain", torch_kernels()(lambda: label(plain, normalize(image.to(device)))), baseline=True)

    whole, windows = Inference("whole"), Inference("sliding_window", case.window)
    sliding = plainly(lambda network, pixels: plain_sliding(network, pixels, case.window, case.classes))
    title = f"{case.encoder}, windows of {case.window}, {size}"
    rows = measure(title, [sliding, *ours(windows)], repeats, device, images=1)
    rows += measure(
        f"{case.encoder}, whole image, {size}", [plainly(plain_label), *ours(whole)], repeats, device, images=1
    )
    return rows + count_rows(case, size, repeats, device)


def count_rows(case: EvalCase, size: str, repeats: int, device: torch.device) -> list[Row]:
    """From class scores to labels, and from labels to counts; each side in the dtype of its own pipeline."""
    scores = blobs(case)
    mask = scores.roll((8, 8), (2, 3)).argmax(1)[0]  # most pixels are right, as after training
    mask[:8] = IGNORE_INDEX
    scores = scores.to(device)
    label = scores.argmax(1)[0]
    confusion = ConfusionMatrix(case.classes, IGNORE_INDEX, device)
    small, small_mask = label.to(torch.uint8), mask.to(device, torch.uint8)
    labels = [
        Side("plain", lambda: scores.argmax(1), baseline=True),
        Side("ours", lambda: scores.max(1)[1].to(torch.uint8)),
    ]
    counts = [
        Side(
            "plain", lambda: plain_counts(label.cpu().numpy(), mask.numpy(), case.classes, IGNORE_INDEX), baseline=True
        ),
        Side("ours", lambda: confusion.update(small, small_mask)),
    ]
    rows = measure(f"labels from scores, {size}", labels, repeats, device, images=1, work=False)
    return rows + measure(f"metric counting, {size}", counts, repeats, device, images=1, work=False)


def blobs(case: EvalCase) -> Tensor:
    """Random smooth class scores (1, K, H, W): regions, as in segmentations."""
    coarse = torch.randn(1, case.classes, 16, 32)
    return F.interpolate(coarse, (case.height, case.width), mode="bilinear", align_corners=False)
