"""run.json, next to config.yaml: command, revision, lists and machine of a run."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from allspark import distributed
from allspark.utils.atomic import durable_write_text
from allspark.utils.errors import UserError, reason_of
from allspark.utils.processor import describe_processor

PROVENANCE = "run.json"
ROOT = Path(__file__).resolve().parents[2]


def write_provenance(folder: Path, command: str, split: Mapping[str, str], device: torch.device, resumed: bool) -> None:
    """Write run.json.

    Args:
        folder: of the run.
        command: arguments of the command line that reproduce the config.
        split: the lists and their hashes, as in a checkpoint.
        device: of the run.
        resumed: whether the run in the folder is continued. If the code has changed, revision becomes
            'OLD, later NEW'.
    """
    previous, now = read_provenance(folder).get("revision") if resumed else None, revision()
    if isinstance(previous, str):
        now = previous if previous.split(", later ")[-1] == now else f"{previous}, later {now}"
    content = {
        "command": command,
        "revision": now,
        "split": dict(split),
        "torch": torch.__version__,
        "device": device.type,
        "processor": describe_processor(device),
        "processes": distributed.world_size(),
    }
    durable_write_text(folder / PROVENANCE, json.dumps(content, indent=1) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty for a run older than the file. UserError if the file is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); restore it or remove it") from None
    if not is_provenance(content):
        raise UserError(f"{path}: not a file of train.py; restore it or remove it")
    return content


def is_provenance(content: Any) -> bool:
    split = content.get("split") if isinstance(content, dict) else None
    return isinstance(split, dict) and all(isinstance(value, str) for value in split.values())


def revision() -> str:
    """Revision of this code: '5182294', '5182294, changed' with uncommitted changes, or the version if installed."""
    try:
        if (ROOT / ".git").exists():
            changed = ", changed" if git("status", "--porcelain", "--untracked-files=no") else ""
            return git("rev-parse", "--short", "HEAD") + changed
        return f"version {importlib.metadata.version('allspark')}"
    except (OSError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError):
        return "unknown"


def git(*arguments: str) -> str:
    # No optional locks: nothing is written to the repository, which may belong to somebody else
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return finished.stdout.strip()
