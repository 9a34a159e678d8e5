"""The optimizer with its parameter groups, frozen parameters, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from allspark.config import OptimConfig
from allspark.utils.errors import UserError


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Freeze what optim.freeze says, and make the optimizer of all other parameters. All of them are decayed.

    Encoder parameters have lr * layer_decay ** distance_to_decoder, all others lr * lr_multi.

    Raises:
        UserError: layer_decay or freeze needs the encoder's blocks, and it has no list of them, or too few.
    """
    encoder = [parameter for name, parameter in model.named_parameters() if is_encoder(name)]
    blocks = getattr(getattr(model, "encoder", None), "blocks", [])
    distance = dict.fromkeys(encoder, 0)
    if cfg.layer_decay != 1 or isinstance(cfg.freeze, int):
        distance = distance_to_decoder(cfg, blocks, encoder)
    if cfg.freeze != "none":
        for parameter in encoder:
            if cfg.freeze == "encoder" or distance[parameter] > len(blocks) - cfg.freeze:
                parameter.requires_grad_(False)
        model.train(model.training)  # frozen modules are in evaluation mode
    members: dict[float, list[nn.Parameter]] = {}
    for parameter in encoder:
        if parameter.requires_grad:
            members.setdefault(cfg.layer_decay ** distance[parameter], []).append(parameter)
    groups = [{"params": parameters, "scale": scale} for scale, parameters in members.items()]
    others = [parameter for name, parameter in model.named_parameters() if not is_encoder(name)]
    groups.append({"params": others, "scale": cfg.lr_multi})
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(groups, cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused)
    # The same as torch's lazy initialization, but defined even if the first step is skipped on the device.
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def distance_to_decoder(
    cfg: OptimConfig, blocks: Sequence[nn.Module], encoder: Sequence[nn.Parameter]
) -> dict[nn.Parameter, int]:
    """Number of blocks from each parameter of the encoder to the decoder, its own included.

    Before the first of n blocks it is n + 1, in the last block 1, after it 0. Parameters between two blocks, such as
    MiT's patch embeddings, count with the block before them.
    """
    count, frozen = len(blocks), cfg.freeze if isinstance(cfg.freeze, int) else 1
    if not 1 <= frozen <= count:
        key = f"freeze={cfg.freeze}" if isinstance(cfg.freeze, int) else f"layer_decay={cfg.layer_decay:g}"
        has = f"it has {count} blocks" if count else "MiT, ResNet and plain ViTs have a list of blocks, and it has none"
        few = f" or 1 to {count}" if count else ""
        remedy = (
            f"use optim.freeze=none, encoder{few}" if isinstance(cfg.freeze, int) else "leave out optim.layer_decay"
        )
        raise UserError(f"optim.{key} does not suit this encoder: {has}; {remedy}")
    number = {parameter: i for i, block in enumerate(blocks, start=1) for parameter in block.parameters()}
    distance, layer = {}, 0
    for parameter in encoder:
        layer = number.get(parameter, layer if layer < count else count + 1)
        distance[parameter] = count + 1 - layer
    return distance


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
    """Before a step: each group gets its multiple of lr."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]
