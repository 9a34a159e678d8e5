"""The command `allspark`, or python -m allspark: one file in cli/ per command, besides train.py and eval.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from allspark.utils.environment import check_environment
from allspark.utils.errors import UserError, run_main
from allspark.utils.signals import exit_on_signals


def main(argv: Sequence[str]) -> None:
    from allspark.arguments import parse_command

    args = parse_command(argv)  # before anything large is imported
    if args.command in ("train", "eval"):
        load_script(args.command).main(argv[1:])
    else:
        load_module(f"allspark.cli.{args.command}").main(args)


def load_script(name: str) -> ModuleType:
    """train.py or eval.py: modules of an installed package, else at the top of the checkout."""
    from allspark.config_io import CONFIG_ROOT, INSTALLED

    if INSTALLED:
        return load_module(f"allspark.{name}")
    if (top := str(CONFIG_ROOT.parent)) not in sys.path:
        sys.path.insert(0, top)  # worker processes inherit it, which may have to import the script again
    return load_module(name)


def load_module(name: str) -> ModuleType:
    """Import a module; UserError if OpenCV cannot be loaded, as its desktop build on a server."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != "cv2":
            raise
        raise UserError(
            f"OpenCV cannot be loaded ({error}). The build that mmcv-lite depends on needs desktop libraries such as "
            "libGL; replace it: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from None


def run() -> int:
    """Entry point of the command `allspark`, which so far has imported little."""
    if sys.argv[1:2] == ["train"]:
        exit_on_signals()
    check_environment()
    return run_main(main)


if __name__ == "__main__":
    sys.exit(run())
