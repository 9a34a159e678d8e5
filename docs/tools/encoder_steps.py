"""CPU time of a supervised training step by encoder, and what channels-last inputs save for networks with batch norm.

    OMP_NUM_THREADS=1 python docs/tools/encoder_steps.py 1    # one thread; the argument is the number of threads

4 images of 257 x 257 pixels, the best of 5 steps, as a ratio to MiT-B0 in the same run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from allspark.config import ModelConfig
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
    image = torch.randn(4, 3, 257, 257, generator=torch.Generator().manual_seed(0))
    unit = None
    for name in ENCODERS:
        model = build_model(ModelConfig(encoder=name), 11, 257).train()
        seconds = step_time(model, image)
        unit = unit or seconds
        line = f"{name:28} {seconds:6.2f} s  {seconds / unit:4.2f}"
        if getattr(model.encoder, "has_batch_norm", False):
            model.encoder.has_batch_norm = False  # as before: the memory format of the image
            line += f"   without channels-last {step_time(model, image) / unit:4.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
