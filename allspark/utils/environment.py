"""Whether the packages that this code needs are installed. Imports nothing but Python's own."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

SETUP = Path("scripts", "setup.sh")


def check_environment() -> None:
    """End the process with exit code 2 and one message if yaml or torch is not installed."""
    missing = next((name for name in ("yaml", "torch") if find_spec(name) is None), None)
    if missing is None:
        return
    root = Path(__file__).resolve().parents[2]
    remedy = f", or in this shell once: cd {root} && . {SETUP}" if (root / SETUP).is_file() else ""
    print(f"error: {missing} is not installed for {sys.executable}; activate its environment{remedy}", file=sys.stderr)
    sys.exit(2)
