"""Command-line arguments that eval.py and several verbs share."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from allspark.config import DEVICES, MODES, PRECISIONS
from allspark.engine.stepper import autocast, set_precision


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for a checkpoint and how images are predicted."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="of train.py or `weights import`"
    )
    parser.add_argument("--dataset", help="data set whose classes imported weights predict; of train.py: checked")
    parser.add_argument("--mode", choices=MODES, help="default: that of the recipe, else of the data set")
    parser.add_argument("--scales", type=scale_list, default=(1.0,), metavar="S,S", help="for example 0.75,1,1.25")
    parser.add_argument("--flip", action="store_true", help="average with the flipped image")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the network; logits are float32")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="of images of equal size")


def precision_context(args: argparse.Namespace, device: torch.device) -> AbstractContextManager:
    """Context for forward passes in --precision; UserError if the device does not support it."""
    set_precision(args.precision, device)
    return autocast(args.precision, device)


def scale_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of factors such as 0.75,1,1.25") from None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a count of 1 or more")
    return int(text)
