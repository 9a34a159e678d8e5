"""The optimizer with its two parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from allspark.config import OptimConfig


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Two parameter groups: the encoder with lr, everything else with lr * lr_multi. All parameters are decayed."""
    named = [(is_encoder(name), p) for name, p in model.named_parameters()]
    encoder, others = [p for inside, p in named if inside], [p for inside, p in named if not inside]
    groups = [{"params": encoder, "scale": 1.0}, {"params": others, "scale": cfg.lr_multi}]
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused)
    # The same as torch's lazy initialization, but defined even if the first step is skipped on the device.
    for parameter in (*encoder, *others):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def is_encoder(name: str) -> bool:
    """Whether a parameter belongs to the pretrained encoder; the feature pyramid on a plain ViT does not."""
    return name.startswith("encoder.") and not name.startswith("encoder.pyramid.")


def scale_lr(cfg: OptimConfig, batch_size: int) -> OptimConfig:
    """The config with the learning rate for this batch size; lr_scaling=linear gives lr for a batch of lr_batch."""
    return cfg if cfg.lr_scaling == "none" else replace(cfg, lr=cfg.lr * batch_size / cfg.lr_batch)


def poly_lr(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: lr * (1 - step / total_steps) ** power, after a linear warm-up from 0.

    Args:
        cfg: its lr, power, warmup_steps and lr_one_step_late are used.
        step: number of the step, from 0.
        total_steps: steps of the whole run.
    """
    # Released: train_allspark.py sets the rate after the step, from that step's number.
    step = max(step - 1, 0) if cfg.lr_one_step_late else step
    warmup = min(step / cfg.warmup_steps, 1) if cfg.warmup_steps else 1
    return warmup * cfg.lr * (1 - step / total_steps) ** cfg.power


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Before a step: the encoder's group gets lr, the other group its multiple."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]
