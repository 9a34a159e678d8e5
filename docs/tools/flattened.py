"""Supervised training with the mean in place of the encoder's deepest map, on which the AllSpark bottleneck sits.

    PYTHONPATH=docs/tools python train.py --dataset camvid --method supervised --split 1_16 \
        method.name=flattened:Flattened

What this loses against `--method supervised` is what the map is worth, and at most what a bottleneck can add to it.
"""

from __future__ import annotations

from torch import Tensor, nn

from allspark.methods.supervised import Supervised
from allspark.models.segmentor import Segmentor


class Flattened(Supervised):
    """Supervised training; the deepest map of the network has one value per channel and image."""

    def attach(self, model: Segmentor) -> None:
        super().attach(model)
        model.encoder.register_forward_hook(flatten_deepest)


def flatten_deepest(encoder: nn.Module, args: tuple[Tensor], maps: list[Tensor]) -> list[Tensor]:
    return [*maps[:-1], maps[-1].mean((2, 3), keepdim=True).expand_as(maps[-1])]
