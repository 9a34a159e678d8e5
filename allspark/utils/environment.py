"""Whether the packages that this code needs are installed. Imports nothing but Python's own."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

SETUP = Path("scripts", "setup.sh")


def check_environment() -> None:
    """End the process with exit code 2 and one message if yaml or torch is not installed."""
    found = {name: find_spec(name) for name in ("yaml", "torch")}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]  # None: any folder
    if not missing:
        return
    root = Path(__file__).resolve().parents[2]
    setup = f", or in this shell once: cd {shlex.quote(str(root))} && . {SETUP}"
    remedy = setup if (root / SETUP).is_file() and os.name != "nt" else ""
    python = sys.executable or "this Python"
    print(
        f"error: {missing[0]} is not installed for {python}; activate the environment with it{remedy}", file=sys.stderr
    )
    sys.exit(2)
