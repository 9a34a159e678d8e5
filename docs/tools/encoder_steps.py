"""CPU time of a supervised training step by encoder, and what channels-last images and oneDNN's products save.

    OMP_NUM_THREADS=1 python docs/tools/encoder_steps.py 1    # one thread; the argument is the number of threads

4 images of 257 x 257 pixels, the best of 5 steps, as ratios to MiT-B0 in the same run. Plain is torch as it comes: the
image's own memory format, and products by MKL. allspark/engine/onednn.py says on which processors they differ.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from allspark.config import ModelConfig
from allspark.engine.onednn import torch_kernels
from allspark.engine.stepper import set_precision
from allspark.models.segmentor import Segmentor, build_model

ENCODERS = ("mit_b0", "timm:tf_efficientnet_lite0", "timm:resnet18", "dinov2_small")


def step_time(model: Segmentor, image: torch.Tensor) -> float:
    """Seconds of the fastest of 5 forward and backward passes, after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model(image).logits.square().mean().backward()
        model.zero_grad()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    set_precision("fp32", torch.device("cpu"))
    image = torch.randn(4, 3, 257, 257, generator=torch.Generator().manual_seed(0))
    unit = None
    print("| encoder | seconds | ratio | with MKL's products | plain |\n|---|---|---|---|---|")
    for name in ENCODERS:
        model = build_model(ModelConfig(encoder=name), 11, 257).train()
        seconds = step_time(model, image)
        unit = unit or seconds
        with torch_kernels():
            by_mkl = plain = step_time(model, image)
            if getattr(model.encoder, "has_batch_norm", False):
                model.encoder.has_batch_norm = False  # keeps the memory format of the image
                plain = step_time(model, image)
        print(
            f"| {name} | {seconds:.2f} | {seconds / unit:.2f} | {by_mkl / unit:.2f} | {plain / unit:.2f} |", flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
