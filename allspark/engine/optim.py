"""The optimizer with its two parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from allspark.config import OptimConfig


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Two groups: the encoder with lr, everything else with lr * lr_multi. Weight decay is on every parameter."""
    named = [(is_encoder(name), p) for name, p in model.named_parameters()]
    encoder, others = [p for inside, p in named if inside], [p for inside, p in named if not inside]
    groups = [{"params": encoder, "scale": 1.0}, {"params": others, "scale": cfg.lr_multi}]
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused)
    for parameter in (*encoder, *others):  # from 0, as it comes out anyway: a first step that is skipped would leave
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)  # what was in the allocated memory
    return optimizer


def is_encoder(name: str) -> bool:
    """Whether a parameter may come from a file of encoder weights: the pyramid of a plain ViT never does."""
    return name.startswith("encoder.") and not name.startswith("encoder.pyramid.")


def scaled(cfg: OptimConfig, batch_size: int) -> OptimConfig:
    """With the learning rate of this batch: lr_scaling=linear states it for batches of lr_batch images."""
    return cfg if cfg.lr_scaling == "none" else replace(cfg, lr=cfg.lr * batch_size / cfg.lr_batch)


def poly_lr(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """lr * (1 - step / total) ** power, with steps counted from 0."""
    # Released: train_allspark.py sets the rate after the step, from that step's number: `late` runs one step behind.
    step = max(step - 1, 0) if cfg.late else step
    return cfg.lr * (1 - step / total_steps) ** cfg.power


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Before the step: lr for the encoder, each group's multiple of it for the rest."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
