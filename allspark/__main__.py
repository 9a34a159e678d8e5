"""allspark <verb> ... or python -m allspark <verb> ...: everything, train.py and eval.py included.

One file in cli/ per verb, one line in VERBS. train and eval are the scripts at the top of a checkout; an installed
package holds them as modules.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from allspark.config_io import CONFIG_ROOT, INSTALLED
from allspark.utils.errors import UserError, run_main

SCRIPTS = {
    "train": "one method on one split: train.py",
    "eval": "a checkpoint -> table of IoU, JSON, pictures: eval.py",
}
VERBS = {
    "bench": "speed and memory of steps, loading and evaluation against a plain formulation of the same maths",
    "check": "everything that can be wrong with a recipe and its data, before training starts",
    "compare": "a table, learning curves and a grid of predictions from finished runs",
    "export": "a checkpoint -> one file for torch.export or ONNX that predicts without this code",
    "predict": "images, folders, lists -> masks of class indices, and pictures to look at",
    "prepare": "official archives -> the layout that the configs expect",
    "report": "curves, classes, confusions, best and worst images of runs on one HTML page",
    "splits": "published lists verified and fetched, lists of one's own drawn: which images are labeled",
    "weights": "encoders and whole models of other code bases, imported and inspected; ImageNet weights fetched",
}


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] in SCRIPTS:  # they read their words themselves, options and overrides in any order
        script(argv[0])(argv[1:])
        return
    prog = "allspark" if INSTALLED else "python -m allspark"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="command", required=True, metavar="verb")
    for name, help_text in (SCRIPTS | VERBS).items():
        verb = verbs.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if argv and argv[0] == name:  # only the verb that is wanted is imported
            module = loaded(f"allspark.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    args.run(args)


def script(name: str) -> Callable[[Sequence[str]], None]:
    """The main function of train.py or eval.py."""
    if INSTALLED:
        return loaded(f"allspark.{name}").main
    if (top := str(CONFIG_ROOT.parent)) not in sys.path:
        sys.path.insert(0, top)  # and so in the processes of a loader, too, which may have to import it again
    return loaded(name).main


def loaded(name: str) -> ModuleType:
    """The module; UserError where OpenCV is absent, or the one for desktops on a machine that is none."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != "cv2":
            raise
        raise UserError(
            f"OpenCV cannot be loaded ({error}). The one that mmcv-lite brings needs a desktop's libraries, such as "
            "libGL; put the one that does not over it: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from None


def run() -> int:
    """The command `allspark`."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(run())
