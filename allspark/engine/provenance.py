"""What is to be known of a run beside its recipe: run.json, which lies beside config.yaml."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from allspark import distributed
from allspark.engine.files import write_text
from allspark.utils.errors import UserError

FACTS = "run.json"
ROOT = Path(__file__).resolve().parents[2]


def write_facts(folder: Path, command: str, split: Mapping[str, str], device: torch.device, resumed: bool) -> None:
    """command: the words of the recipe. split: the lists and their hashes, as in a checkpoint. resumed: the folder's
    run goes on, maybe with other code: its revision then reads 'OLD, later NEW'.
    """
    went, now = read_facts(folder).get("revision") if resumed else None, revision()
    if isinstance(went, str):
        now = went if went.split(", later ")[-1] == now else f"{went}, later {now}"
    facts = {
        "command": command,
        "revision": now,
        "split": dict(split),
        "torch": torch.__version__,
        "device": device.type,
        "processes": distributed.world_size(),
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """Nothing of a run that is older than the file; UserError where it is damaged."""
    path = folder / FACTS
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or remove it: it is not needed") from None
    right = isinstance(facts, dict) and isinstance(facts.get("split"), dict)
    if not right or not all(isinstance(value, str) for value in facts["split"].values()):
        raise UserError(f"{path}: is not what train.py writes; restore it, or remove it: it is not needed")
    return facts


def revision() -> str:
    """Of this code: '5182294', of a checkout with uncommitted changes '5182294, changed', else its version."""
    try:
        if (ROOT / ".git").exists():
            changed = ", changed" if git("status", "--porcelain", "--untracked-files=no") else ""
            return git("rev-parse", "--short", "HEAD") + changed
        return f"version {importlib.metadata.version('allspark')}"
    except (OSError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError):
        return "unknown"


def git(*words: str) -> str:
    # No optional locks: nothing is written to a checkout, which may be another's
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()
