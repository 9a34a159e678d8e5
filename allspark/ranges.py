"""Which numbers a recipe may hold."""

from __future__ import annotations

import functools
from typing import Any

from allspark.utils.errors import UserError

INF = 2**31 - 1  # of a count: no upper end that anybody meets
RANGES = {  # key path -> smallest and largest value; None is left alone
    "epochs": (1, INF),
    "batch_size": (1, INF),
    "micro_batch": (1, INF),
    "burn_in_epochs": (0, INF),
    "seed": (0, 2**31 - 1),
    "log_interval": (1, INF),
    "checkpoint_interval": (0, INF),
    "checkpoint_minutes": (0, 1e6),
    "optim.max_skipped": (1, INF),
    "data.crop_size": (64, 2**14),
    "data.photometric_probability": (0, 1),
    "data.num_workers": (0, 1024),
    "data.timeout": (1, 1e6),
    "model.decoder_channels": (1, 2**14),
    "model.drop_path": (0, 0.99),
    "model.dropout": (0, 0.99),
    "model.bottleneck.dropout": (0, 0.99),
    "model.bottleneck.num_heads": (1, 64),
    "model.bottleneck.warmup_epochs": (0, INF),
    "optim.lr_multi": (0, 1e6),
    "optim.lr_batch": (1, INF),
    "optim.clip_norm": (1e-6, 1e9),
    "optim.momentum": (0, 0.9999),
    "optim.weight_decay": (0, 1e3),
    "optim.power": (0, 100),
    "criterion.thresh": (0, 1),
    "criterion.min_kept": (0, INF),
    "criterion.dice": (0, 100),
    "evaluation.interval": (1, INF),
    "evaluation.window": (32, 2**14),
    "evaluation.pseudo_labels": (0, INF),
    "evaluation.pictures": (0, 1000),
}


def check_ranges(recipe: Any, source: str) -> None:
    """UserError for the first value that is out of its range."""
    for path, (least, most) in RANGES.items():
        value = functools.reduce(getattr, path.split("."), recipe)
        if value is not None and not least <= value <= most:  # which no nan is
            want = f"at most {most}" if value > most else f"at least {least}"
            raise UserError(f"{source}: {path}={value} must be {want}")
    if not 0 < recipe.optim.lr < INF:
        raise UserError(f"{source}: optim.lr={recipe.optim.lr} must be above 0 and below {INF}")
    low, high = recipe.data.scale_range
    if not 0.01 <= low <= high <= 100:
        raise UserError(
            f"{source}: data.scale_range=[{low}, {high}] must be two factors of 0.01..100, the smaller first"
        )
