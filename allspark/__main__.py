"""python -m allspark <verb> ...: everything beside train.py and eval.py.

One file in cli/ per verb, one line in VERBS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from allspark.errors import run_main

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
    parser = argparse.ArgumentParser(prog="python -m allspark", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="command", required=True, metavar="verb")
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if argv and argv[0] == name:  # only the verb that is wanted is imported
            module = importlib.import_module(f"allspark.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_main(main))
