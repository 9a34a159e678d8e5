"""Checkpoints: written atomically, tensors and plain values only, so that they load with weights_only=True.

Of train.py they hold a run: its recipe, the state of model, method and optimizer, where it stands. Imported ones hold
a model, {"model", "architecture": {"model", "num_classes", "crop_size"}, "source": {"format", "file", "sha256"}}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allspark import distributed
from allspark.engine.files import replace_file
from allspark.utils.errors import UserError, reason_of
from allspark.utils.safe_load import load_tensors

LATEST, PREVIOUS = "latest.pth", "previous.pth"  # in a run's folder: to resume from, and the one before it
BEST = "best.pth"  # of the epoch with the best mIoU on val
IN_ORDER = (LATEST, PREVIOUS, BEST)  # in which they are tried
FORMAT = "allspark-1"
TO_PREDICT = ("model", "method", "epoch", "step", "recipe", "split")  # what one of train.py must hold to be evaluated
TO_RESUME = (*TO_PREDICT, "optimizer", "best")
IMPORTED = ("model", "architecture", "source")  # what an imported one holds


@dataclass(frozen=True)
class Position:
    """Where a run stands: behind `step` steps in all, in this epoch. Behind the last step of its epoch the evaluation
    is to come; after that the same step is the next epoch's first.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = dataclasses.field(default_factory=lambda: {"miou": -1.0, "epoch": -1})
    world_size: int | None = None  # with which it went so far


def save_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Durable, verified, at once; previous: where the file that it replaces is kept. UserError where it cannot be."""
    replace_file(
        path,
        lambda file: torch.save({"format": FORMAT, **content}, file),
        verify=check_sums,
        previous=previous,
    )


def check_sums(path: Path) -> None:
    """OSError unless a file of torch.save, a zip, is what its checksums say: torch itself does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile raises many kinds on a damaged directory
        raise OSError(f"damaged: {reason_of(error)}") from error
    if wrong is not None:
        raise OSError(f"damaged: the checksum of {wrong} is wrong")


def load_checkpoint(path: str | Path, needed: Sequence[str] | None = None) -> dict[str, Any]:
    """What save_checkpoint wrote, on the CPU. No code in the file can run.

    needed: what must be in it; None: what its kind, of train.py or imported, needs to predict. UserError: it is
    damaged, or something else; OSError: the system does not let it be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the path of a best.pth or latest.pth")
    try:
        content = load_tensors(path)
        if zipfile.is_zipfile(path):  # else torch's older pickle, which holds none of ours
            check_sums(path)
    except Exception as error:  # truncated, bit-flipped, foreign, or holding code: torch raises many kinds
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise  # permissions, a server that is away: nothing is said of what the file holds
        raise UserError(
            f"{path}: not a readable checkpoint, truncated or of another program ({reason_of(error)}); "
            f"copy it again, or use another one: best.pth, latest.pth and previous.pth of a run are each whole"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path}: no checkpoint of this program (format '{FORMAT}'); give one that train.py wrote, "
            f"or bring the weights in: python -m allspark weights import {path} --out FILE"
        )
    check_content(content, needed, path)
    return content


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """What a run in this folder goes on from, and what there is to say: latest.pth; if it cannot be read the one before
    it; else best.pth. None: nothing was saved. UserError: there is something, and nothing of it can be read. OSError:
    the system does not let it be read now, which is no reason to go on from an older one.
    """
    if not any((folder / name).exists() for name in (LATEST, PREVIOUS)):
        return None
    errors: dict[str, UserError] = {}
    for name in IN_ORDER:
        try:
            content = load_checkpoint(folder / name, TO_RESUME)
            check_position(content, folder / name)
            why = ", ".join(map(str, errors.values()))
            told = f"WARNING: going on from {name}, step {content['step']}, because of {why}"
            return folder / name, content, [told] * bool(errors)
        except UserError as error:
            if (folder / name).exists() or name == LATEST:
                errors[name] = error
    if len(errors) == 1:
        raise UserError(f"{errors[LATEST]} (--fresh starts over)")
    raise UserError(
        f"{folder}: none of {', '.join(errors)} can be read; bring one of them back, or --fresh to start over. "
        f"{errors[LATEST]}"
    )


def choice_of_first(name: str | None, device: torch.device) -> str | None:
    """What process 0 found, on all of them: no two may go on from different steps."""
    index = distributed.broadcast(torch.tensor(-1 if name is None else IN_ORDER.index(name), device=device))
    return None if index < 0 else IN_ORDER[index]


def check_position(content: Mapping[str, Any], path: Path) -> None:
    """UserError unless it says where its run stands."""
    best, log = content["best"], content.get("log", [])
    right = all(isinstance(content[name], int) and content[name] >= 0 for name in ("epoch", "step"))
    right &= isinstance(best, dict) and all(isinstance(best.get(key), int | float) for key in ("miou", "epoch"))
    right &= isinstance(log, list) and all(isinstance(one, dict) for one in log)
    right &= isinstance(content["split"], dict) and {"name", "sha256"} <= content["split"].keys()
    if not (right and all(isinstance(value, Tensor) for one in log for value in one.values())):
        raise UserError(f"{path}: does not say where its run stands; use another checkpoint, or --fresh to start over")


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """What else a checkpoint holds is loaded in here: whatever torch raises, it is another program's or made up."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: its optimizer, counters or buffers are not those of this recipe ({reason_of(error)}); use "
            f"another checkpoint, or --fresh to start over"
        ) from error


def buffers_by_rank(modules: Mapping[str, torch.nn.Module], shared: Sequence[str] = ()) -> dict[str, Tensor]:
    """The buffers that differ between processes, stacked by rank: prefix.name -> (P, ...); called by all of them.

    Batch norm statistics on CPUs, and a memory that each process has for itself. shared: prefixes of buffers of which
    that of process 0 counts anyway.
    """
    if distributed.world_size() == 1:
        return {}
    found = {}
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(prefix):
            if not name.startswith(tuple(shared)):
                every = distributed.all_gather(buffer.detach()[None])
                if not all(torch.equal(every[0], one) for one in every[1:]):
                    found[name] = every
    return found


@torch.no_grad()
def load_own_buffers(modules: Mapping[str, torch.nn.Module], ranks: Mapping[str, Tensor]) -> None:
    """This process's share of buffers_by_rank, where as many processes saved it; else all keep those of process 0."""
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(prefix):
            if name in ranks and ranks[name].shape == (distributed.world_size(), *buffer.shape):
                buffer.copy_(ranks[name][distributed.rank()])


def is_imported(content: Mapping[str, Any]) -> bool:
    return "architecture" in content and "recipe" not in content


def check_content(content: Mapping[str, Any], needed: Sequence[str] | None, path: Path) -> None:
    imported = is_imported(content)
    missing = [key for key in needed or (IMPORTED if imported else TO_PREDICT) if key not in content]
    if missing and imported and needed:
        raise UserError(
            f"{path}: imported weights, no run that could be resumed; "
            f"keep the file elsewhere and start from it with model.init_from=FILE"
        )
    if missing:
        kind = "whole imported checkpoint" if imported else "checkpoint of train.py"
        raise UserError(f"{path}: not a {kind}, it has no '{missing[0]}'; use another one")


def load_state(module: torch.nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """load_state_dict with a mismatch told in one sentence (another class count, crop or encoder).

    Strict but for what a module fills in for itself, such as the count of a memory that was saved without one.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds something else than tensors by name; use another checkpoint")
    own = module.state_dict()
    alike = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    missing = module.load_state_dict(alike, strict=False).missing_keys
    wrong = list(dict.fromkeys([*missing, *(name for name in state if name not in alike)]))
    if wrong:
        name = wrong[0]
        there = tuple(state[name].shape) if name in state else "absent"
        here = tuple(own[name].shape) if name in own else "absent"
        raise UserError(
            f"{path}: does not fit the model of this recipe: {len(wrong)} tensors differ, first {name}: {there} in the "
            f"file, {here} in the model; it was trained with other classes, crop_size or model.* "
            f"(to fine-tune from it: model.init_from)"
        )
