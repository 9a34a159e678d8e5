"""allspark bench: speed and memory, compared with a plain implementation of the same math."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from allspark import distributed, launch
from allspark.bench import report
from allspark.bench.evaluation import EvalCase, bench_eval
from allspark.bench.loader import LoaderCase, bench_loader
from allspark.bench.measure import Row
from allspark.bench.parts import LARGEST
from allspark.bench.photos import LIKENESSES
from allspark.bench.scale import SWEEPS, bench_scale
from allspark.bench.step import StepCase, bench_step
from allspark.engine.stepper import has_bf16, set_precision
from allspark.utils.atomic import write_text
from allspark.utils.errors import UserError
from allspark.utils.markdown import markdown_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"

Bench = Callable[[argparse.Namespace, torch.device, Path], tuple[list[Row], list[str]]]

NO_BF16 = "bf16 was not measured"


def main(args: argparse.Namespace) -> None:
    if args.bench == "docs":
        write_document(args.document or DOCUMENT)
        return
    set_defaults(args)
    if args.json is not None and (args.json.is_dir() or args.json.suffix.lower() != ".json"):
        raise UserError(f"--json {args.json}: give the name of a file that ends in .json")
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
    print(render(result), end="")  # before the file: a full disk must not lose the measurement
    if path is not None:
        write_text(path, json.dumps(result, indent=1) + "\n", "free disk space or choose another --json")


def choose_precisions(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Set the default of --precision and return notes on it; UserError for one that the device does not support."""
    if not hasattr(args, "precision"):
        return []
    notes = []
    if args.precision is None:
        args.precision = ["fp32", "bf16"] if has_bf16(device) else ["fp32"]
        if not has_bf16(device):
            notes.append(f"{NO_BF16}: this processor only emulates it (--precision fp32 bf16 measures it)")
    for precision in args.precision:
        set_precision(precision, device)
    return notes


def step(args: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[Row], list[str]]:
    sides, notes, case = args.sides, [], case_of(StepCase, args)
    if sides is None:
        sides = ["plain", "ours", *(["transformers"] if (case.encoder, case.crop) == ("mit_b0", 257) else [])]
    if (world := distributed.world_size()) > 1:
        sides, notes = ["ours"], [f"{world} processes: only ours is measured"]
        if case.batch % world:
            raise UserError(f"--batch {case.batch} is not divisible by {world} processes; give a multiple of {world}")
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


CASES = {"step": StepCase, "loader": LoaderCase, "eval": EvalCase}


def set_defaults(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves to the cases; UserError for an unknown name of --like or --vary."""
    for field in fields(CASES[args.bench]) if args.bench in CASES else ():
        if getattr(args, field.name, None) is None and field.default is not MISSING:
            setattr(args, field.name, field.default)
    for option, known in (("like", LIKENESSES), ("vary", SWEEPS)):
        if hasattr(args, option):
            names = getattr(args, option) or list(known)
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"--{option} {unknown[0]}: unknown; choose one of {', '.join(known)}")
            setattr(args, option, names)


def case_of(kind: type, args: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


BENCHES: dict[str, Bench] = {"step": step, "loader": loader, "eval": evaluation, "scale": scale}


def render(result: dict[str, Any], omit: Sequence[str] = ()) -> str:
    """A result as Markdown: table, machine, notes."""
    return f"{markdown_table(report.table(result, omit))}\n{render_remarks(result)}"


def render_remarks(result: dict[str, Any]) -> str:
    return "".join(f"- {line}\n" for line in report.remarks(result))


def write_document(path: Path) -> None:
    """Update a document from the JSON files named in it: their tables, or the figures of bench scale."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of the document") from None
    made: list[Path] = []

    def render_table(name: str) -> str | None:
        source = path.parent / name
        if not source.is_file():
            print(f"{source}: does not exist, its table is unchanged")
            return None
        result = read_result(source)
        # The JSON file keeps the notes that are left out
        result["notes"] = [note for note in result["notes"] if not any(words in note for words in (LARGEST, NO_BF16))]
        pictures = report.plot_scale(result, path.parent)
        made.extend(pictures)
        figures = "".join(f"![{picture.stem}]({picture.name})\n\n" for picture in pictures)
        return figures + render_remarks(result) if pictures else render(result, omit=("images/s", "GFLOP"))

    write_text(path, report.fill_tables(text, render_table), "free disk space or choose another document")
    print(f"written: {', '.join(map(str, [path, *made]))}")


def read_result(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        report.table(result)
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of bench ({error}); measure again with --json {path}") from None
