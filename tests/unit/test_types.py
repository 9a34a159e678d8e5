"""The type hints that pyproject.toml names are consistent."""

import subprocess
import sys

import pytest

from helpers import REPO


def test_type_hints():
    pytest.importorskip("mypy", reason="type hints are checked by mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
