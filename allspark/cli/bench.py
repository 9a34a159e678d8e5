"""python -m allspark bench: speed and memory, ours against the plain formulation of the same maths."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from allspark import distributed, launch
from allspark.bench import report
from allspark.bench.evaluation import EvalCase, bench_eval
from allspark.bench.loader import LoaderCase, bench_loader
from allspark.bench.measure import Row
from allspark.bench.photos import LIKENESSES
from allspark.bench.scale import SWEEPS, bench_scale
from allspark.bench.step import StepCase, bench_step
from allspark.cli.arguments import positive
from allspark.cli.compare import markdown
from allspark.config import PRECISIONS
from allspark.data.base import IGNORE_INDEX
from allspark.engine.stepper import has_bf16, set_precision
from allspark.models.mit import MiT
from allspark.models.segmentor import ENCODERS
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"
MITS = [name for name, make in ENCODERS.items() if make.func is MiT]

Bench = Callable[[argparse.Namespace, torch.device, Path], tuple[list[Row], list[str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="bench", required=True, metavar="step|loader|eval|scale|docs")
    add_step(verbs.add_parser("step", help="a training step of AllSpark that reads the memory"))
    add_loader(verbs.add_parser("loader", help="from files to tensors: VOC-like JPEGs, Cityscapes-like PNGs, made up"))
    add_eval(verbs.add_parser("eval", help="sliding windows, a whole image, counting pixels"))
    add_scale(verbs.add_parser("scale", help="the step as classes, crop, batch, encoder and processes grow"))
    docs = verbs.add_parser("docs", help="write the tables and pictures of docs/benchmarks.md from its JSON files")
    docs.add_argument("document", type=Path, nargs="?", default=DOCUMENT)


def add_step(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add_model(parser, StepCase())
    parser.add_argument("--crop", type=pixels, default=StepCase.crop, help="side of the images")
    parser.add_argument("--batch", type=positive, default=StepCase.batch, help="labeled images, and as many unlabeled")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile (compile=true in a recipe)")
    parser.add_argument("--checkpointing", action="store_true", help="ours with model.checkpointing=true")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=("plain", "ours", "transformers"),
        help="default: plain and ours; for mit_b0 at crop 257 transformers, too",
    )
    add_precision(parser)


def add_loader(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--like", nargs="+", choices=LIKENESSES, default=list(LIKENESSES))
    parser.add_argument(
        "--workers", type=partial(whole, 0, 1024), default=LoaderCase.workers, help="of each side; 0: none"
    )
    parser.add_argument("--batch", type=positive, default=LoaderCase.batch)
    parser.add_argument("--images", type=positive, help="files of each; default: 64 JPEGs, 16 PNGs")


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    add_model(parser, EvalCase())
    parser.add_argument("--height", type=pixels, default=EvalCase.height)
    parser.add_argument("--width", type=pixels, default=EvalCase.width)
    parser.add_argument("--window", type=pixels, default=EvalCase.window)
    add_precision(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    add_common(parser, repeats=3)
    parser.add_argument("--vary", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    add_precision(parser)


def add_common(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto")
    parser.add_argument("--repeats", type=positive, default=repeats, help="runs of each side, behind a warm-up")
    parser.add_argument("--threads", type=positive, help="of torch, for all sides; default: as torch has it")


def add_model(parser: argparse.ArgumentParser, default: StepCase | EvalCase) -> None:
    parser.add_argument("--encoder", choices=MITS, default=default.encoder)
    parser.add_argument("--classes", type=partial(whole, 1, IGNORE_INDEX), default=default.classes)


def whole(least: int, most: int, text: str) -> int:
    if not text.isdigit() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {least} to {most}")
    return int(text)


pixels = partial(whole, 64, 2**14)  # a side of an image, a crop or a window


def add_precision(parser: argparse.ArgumentParser) -> None:
    words = "of ours, one side each (the plain side is fp32); default: fp32, and bf16 where it is no emulation"
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help=words)


def main(args: argparse.Namespace) -> None:
    if args.bench == "docs":
        write_document(args.document)
        return
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json {args.json}: a folder; give a file name")
    threads = torch.get_num_threads()
    with launch.process_group(args.device) as device, TemporaryDirectory() as folder:
        try:
            torch.set_num_threads(args.threads or threads)
            notes = choose_precisions(args, device)
            rows, more = BENCHES[args.bench](args, device, Path(folder))
            options = {key: value for key, value in vars(args).items() if isinstance(value, str | int | list)}
            if distributed.is_main():
                write(report.make_result(args.bench, options, rows, [*notes, *more], device), args.json)
        finally:
            torch.set_num_threads(threads)


def write(result: dict[str, Any], path: Path | None) -> None:
    print(rendered(result), end="")  # first: what was measured is not lost with a full disk
    if path is not None:
        write_text(path, json.dumps(result, indent=1) + "\n", "make room or choose another --json")


def choose_precisions(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Fill in --precision, and say what it leaves out; UserError for one that the device does not have."""
    if not hasattr(args, "precision"):
        return []
    notes = []
    if args.precision is None:
        args.precision = ["fp32", "bf16"] if has_bf16(device) else ["fp32"]
        if not has_bf16(device):
            notes.append(
                "bf16 was not measured: this processor only emulates it (--precision fp32 bf16 does all the same)"
            )
    for precision in args.precision:
        set_precision(precision, device)
    return notes


def step(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[Row], list[str]]:
    sides, notes, case = args.sides, [], case_of(StepCase, args)
    if sides is None:
        sides = ["plain", "ours", *(["transformers"] if (case.encoder, case.crop) == ("mit_b0", 257) else [])]
    if (world := distributed.world_size()) > 1:
        sides, notes = ["ours"], [f"{world} processes: ours alone"]
        if case.batch % world:
            raise UserError(f"--batch {case.batch} does not divide among {world} processes; give a multiple of it")
    rows, more = bench_step(case, args.precision, sides, args.repeats, device)
    return rows, [*notes, *more]


def loader(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[Row], list[str]]:
    rows, notes = [], []
    for name in args.like:
        case = LoaderCase(name, args.workers, args.batch, args.images)
        measured, more = bench_loader(case, folder / name, args.repeats, device)
        rows += measured
        notes += more
    return rows, notes


def evaluation(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[Row], list[str]]:
    return bench_eval(case_of(EvalCase, args), args.precision, args.repeats, device), []


def scale(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[Row], list[str]]:
    return bench_scale(args.vary, args.precision, args.repeats, torch.get_num_threads(), args.device, folder)


def case_of(kind: type, args: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


BENCHES: dict[str, Bench] = {"step": step, "loader": loader, "eval": evaluation, "scale": scale}


def rendered(result: dict[str, Any]) -> str:
    """A result as Markdown: its table, what it was measured on, notes."""
    return "\n".join([markdown(report.table(result)), *(f"- {line}" for line in report.remarks(result)), ""])


def write_document(path: Path) -> None:
    """Fill in the tables whose JSON, named relative to the document, is there; draw what was varied beside it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the document to fill in") from None
    made: list[Path] = []

    def render(name: str) -> str | None:
        source = path.parent / name
        if not source.is_file():
            print(f"{source}: not there, its table is left as it is")
            return None
        result = read_result(source)
        pictures = report.plot_scale(result, path.parent)
        made.extend(pictures)
        return rendered(result) + "".join(f"\n![{picture.stem}]({picture.name})\n" for picture in pictures)

    write_text(path, report.fill_tables(text, render), "make room, or give a document of your own")
    print(f"written: {', '.join(map(str, [path, *made]))}")


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        report.table(result)
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of bench ({error}); measure it again with --json {path}") from None
