"""Checkpoints: written atomically, and only tensors and plain values, so that they load with weights_only=True.

A checkpoint of train.py holds a run: its recipe, the state of model, method and optimizer, and its position. An
imported one holds a model: {"model", "architecture": {"model", "num_classes", "crop_size"}, "source": {"format",
"file", "sha256"}}.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allspark import distributed
from allspark.utils.atomic import durable_write
from allspark.utils.errors import UserError, abbreviate, reason_of
from allspark.utils.retry import retry_transient, system_error
from allspark.utils.safe_load import load_tensors, same_kind

LATEST, PREVIOUS = "latest.pth", "previous.pth"  # to resume from, and the one before it
BEST = "best.pth"  # after the epoch with the best mIoU on val
IN_ORDER = (LATEST, PREVIOUS, BEST)  # the order in which they are tried
FORMAT = "allspark-1"
TO_PREDICT = ("model", "method", "epoch", "step", "recipe", "split")  # what evaluation needs
TO_RESUME = (*TO_PREDICT, "optimizer", "best")
IMPORTED = ("model", "architecture", "source")  # content of an imported checkpoint


def checkpoint_in(path: str | Path, best: bool = False) -> Path:
    """The checkpoint of a run's folder: of the last epoch, or of the best one. The path of a file is returned as it is.

    Raises:
        UserError: best is asked for, but the path is that of a file.
    """
    path = Path(path)
    if best and path.is_file():
        raise UserError(f"--best needs the folder of a run, and {path} is a file; give the folder, or omit --best")
    return path / (BEST if best else LATEST) if path.is_dir() else path


def save_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint atomically and verify it.

    Args:
        path: file to write.
        content: tensors and plain values.
        previous: where to keep the replaced file; None discards it.

    Raises:
        UserError: it cannot be written.
    """
    durable_write(
        path, lambda file: torch.save({"format": FORMAT, **content}, file), verify=verify_checksums, previous=previous
    )


def verify_checksums(path: Path) -> None:
    """OSError if a file of torch.save, a zip, does not match its checksums, which torch itself does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile raises many kinds on a damaged directory
        raise OSError(f"damaged: {reason_of(error)}") from error
    if wrong is not None:
        raise OSError(f"damaged: the checksum of {wrong} is wrong")


def no_checkpoint(path: Path) -> str:
    """The message for a checkpoint that does not exist, with the runs that are in the folder."""
    folder = path.parent if path.name in (LATEST, BEST) else path
    if runs := find_runs(folder):
        return f"{path}: no such checkpoint; give one of the runs in {folder}: {abbreviate(runs)}"
    return f"{path}: no such checkpoint; give the folder of a run, which train.py prints, or the path of a checkpoint"


def find_runs(folder: Path, depth: int = 3, most: int = 1000) -> list[str]:
    """The folders with a checkpoint at most so deep below `folder`, among its first so many folders."""
    runs, level = [], [str(folder)]
    for _ in range(depth):
        below: list[str] = []
        for name in level:
            with contextlib.suppress(OSError, ValueError), os.scandir(name) as entries:
                below += (entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        level = sorted(below)[:most]
        runs += [name for name in level if os.path.isfile(os.path.join(name, LATEST))]
    return runs


def load_checkpoint(path: str | Path, needed: Sequence[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint to the CPU. Code in the file cannot run.

    Args:
        path: a file of save_checkpoint.
        needed: required entries; None: those that its kind, of train.py or imported, needs for prediction.

    Raises:
        UserError: the file is damaged or no checkpoint of this program.
        OSError: a system error prevented reading; the file may be intact.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(no_checkpoint(path))
    try:
        content = retry_transient(partial(read_verified, path))
    except Exception as error:  # truncated, damaged, foreign or with code in it: torch raises many types
        if (cause := system_error(error)) is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise UserError(
            f"{path}: not a readable checkpoint, truncated or of another program ({reason_of(error)}); "
            f"copy it again, or use another one: best.pth, latest.pth and previous.pth of a run are each complete"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this program (format '{FORMAT}'); give one of train.py, "
            f"or import the weights: python -m allspark weights import {path} --out FILE"
        )
    check_content(content, needed, path)
    return content


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in IN_ORDER)


def read_verified(path: Path) -> Any:
    content = load_tensors(path)
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # else torch's legacy format, which has no checksums
    if is_zip:
        verify_checksums(path)
    return content


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The checkpoint to resume from: latest.pth, if it is damaged previous.pth, else best.pth.

    Returns:
        Path, content and notes for the log; None if nothing was saved.

    Raises:
        UserError: there are checkpoints, but none can be read.
        OSError: a system error prevented reading; the file may be intact, so no older one is taken in its place.
    """
    if not has_checkpoint(folder):
        return None
    errors: dict[str, UserError] = {}
    for name in IN_ORDER:
        try:
            content = load_checkpoint(folder / name, TO_RESUME)
            check_position(content, folder / name)
            why = ", ".join(map(str, errors.values()))
            note = f"WARNING: resuming from {name} (step {content['step']}): {why}"
            return folder / name, content, [note] * bool(errors)
        except UserError as error:
            if (folder / name).exists() or name == LATEST:
                errors[name] = error
    found = {name: error for name, error in errors.items() if (folder / name).exists()}
    first = next(iter(found.values()))
    if len(found) == 1:
        raise UserError(f"{first} (--fresh starts over)")
    raise UserError(
        f"{folder}: none of {', '.join(found)} can be read; restore one of them, or use --fresh to start over. {first}"
    )


def broadcast_choice(name: str | None, device: torch.device) -> str | None:
    """The checkpoint name that process 0 found, on all processes."""
    index = distributed.broadcast(torch.tensor(-1 if name is None else IN_ORDER.index(name), device=device))
    return None if index < 0 else IN_ORDER[index]


def check_position(content: Mapping[str, Any], path: Path) -> None:
    """UserError if the position of the run in a checkpoint is missing or malformed."""
    best, log = content["best"], content.get("log", [])
    valid = all(type(content[name]) is int and content[name] >= 0 for name in ("epoch", "step"))
    valid = valid and isinstance(best, dict) and all(type(best.get(key)) in (int, float) for key in ("miou", "epoch"))
    valid = valid and -1 <= best["miou"] <= 100 and -1 <= best["epoch"] <= content["epoch"]
    valid = valid and isinstance(log, list) and all(isinstance(one, dict) for one in log)
    valid = valid and isinstance(content["split"], dict) and {"name", "sha256"} <= content["split"].keys()
    if not (valid and all(isinstance(value, Tensor) and not value.ndim for one in log for value in one.values())):
        raise UserError(
            f"{path}: its training position is missing or malformed; use another checkpoint, or --fresh to start over"
        )


@contextlib.contextmanager
def explain_mismatch(path: Path) -> Iterator[None]:
    """Context for loading optimizer, counters and buffers: turn any exception into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: its optimizer, counters or buffers do not match this recipe ({reason_of(error)}); use "
            f"another checkpoint, or --fresh to start over"
        ) from error


def buffers_by_rank(modules: Mapping[str, torch.nn.Module], shared: Sequence[str] = ()) -> dict[str, Tensor]:
    """The buffers that differ between processes; a collective call.

    These are batch norm statistics on CPUs, and the memory if each process has its own.

    Args:
        modules: prefix -> module.
        shared: prefixes of buffers for which those of process 0 are saved anyway.

    Returns:
        prefix.name -> (P, ...), stacked by rank.
    """
    if distributed.world_size() == 1:
        return {}
    found = {}
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(prefix):
            if not name.startswith(tuple(shared)):
                stacked = distributed.all_gather(buffer.detach()[None])
                if not all(torch.equal(stacked[0], other) for other in stacked[1:]):
                    found[name] = stacked
    return found


@torch.no_grad()
def load_buffers_of_rank(modules: Mapping[str, torch.nn.Module], ranks: Mapping[str, Tensor]) -> None:
    """Load this process's entries of buffers_by_rank; with another number of processes all keep those of process 0."""
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
            f"{path}: imported weights, not a run that could be resumed; "
            f"move the file elsewhere and start from it with model.init_from=FILE"
        )
    if missing:
        kind = "complete imported checkpoint" if imported else "checkpoint of train.py"
        raise UserError(f"{path}: not a {kind}: it has no '{missing[0]}'; use another one")


def load_state(module: torch.nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """load_state_dict with a short message for a mismatch (another class count, crop or encoder).

    Strict, except for entries that a module fills in itself, such as the count of a memory saved without one.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: does not hold tensors by name; use another checkpoint")
    own = module.state_dict()
    matching = {
        name: value
        for name, value in state.items()
        if name in own and value.shape == own[name].shape and same_kind(value, own[name])
    }
    missing = module.load_state_dict(matching, strict=False).missing_keys
    wrong = list(dict.fromkeys([*missing, *(name for name in state if name not in matching)]))
    if wrong:
        name = wrong[0]
        in_file, in_model = (describe_tensor(tensors.get(name)) for tensors in (state, own))
        raise UserError(
            f"{path}: does not match the model of this recipe: {len(wrong)} tensors differ, first {name}: {in_file} in "
            f"the file, {in_model} in the model; it was trained with other classes, crop_size or model.* "
            f"(to fine-tune from it: model.init_from)"
        )


def describe_tensor(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
