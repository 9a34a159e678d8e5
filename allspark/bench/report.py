"""Output of the benchmark: results as plain values, tables, curves, and the tables of a document."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from allspark import distributed
from allspark.bench.machine import describe, floor
from allspark.bench.measure import Row
from allspark.visualization.pictures import new_figure, save_figure

Values = Mapping[str, Any]


def make_result(
    bench: str, options: Values, rows: Sequence[Row], notes: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """All measurements and a description of the machine, as values for JSON."""
    rates = floor(device, [row.precision for row in rows])
    return {
        "bench": bench,
        "options": dict(options),
        "machine": describe(device),
        "floor": rates,
        "rows": [with_derived(row, rows, rates) for row in rows],
        "notes": list(notes),
    }


def with_derived(row: Row, rows: Sequence[Row], rates: Values) -> dict[str, Any]:
    """A row with derived values.

    These are the median, the ratio to the baseline of its case, images per second, and the seconds that its operations
    would take at the measured matrix rate and its bytes at the measured copy rate.
    """
    median = statistics.median(row.seconds)
    derived = {"median": median, "min": min(row.seconds), "max": max(row.seconds)}
    if row.images:
        derived["images_per_second"] = row.images / median
    base = next((other for other in rows if other.case == row.case and other.baseline), None)
    if base is not None:
        derived["ratio"] = statistics.median(base.seconds) / median
    if row.work is not None:
        processes = distributed.world_size()  # which share the work; the rates are those of one
        derived["seconds_at_matrix_rate"] = row.work.flops / rates[row.precision] / processes
        derived["seconds_at_copy_rate"] = row.work.moved_bytes / rates["copy"] / processes
        derived["share_of_matrix_rate"] = derived["seconds_at_matrix_rate"] / median
        if base is not None:
            derived["peak_ratio"] = row.work.peak_bytes / base.work.peak_bytes
    return {**dataclasses.asdict(row), **derived}


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def format_value(key: str, form: Callable[[Any], str]) -> Callable[[Values], str]:
    return lambda row: "" if row.get(key) is None else form(row[key])


COLUMNS: dict[str, Callable[[Values], str]] = {
    "case": lambda row: row["case"],
    "side": lambda row: row["side"] + ("" if row["precision"] == "fp32" else f", {row['precision']}"),
    "ms (min-max)": lambda row: "{} ({}-{})".format(*(milliseconds(row[key]) for key in ("median", "min", "max"))),
    "ratio": format_value("ratio", lambda ratio: f"{ratio:.2f}x"),
    "images/s": format_value("images_per_second", lambda rate: f"{rate:.3g}"),
    "peak MiB": format_value("work", lambda work: f"{work['peak_bytes'] / 2**20:,.0f}"),
    "peak ratio": format_value("peak_ratio", lambda ratio: f"{ratio:.2f}x"),
    "GFLOP": format_value("work", lambda work: f"{work['flops'] / 1e9:,.1f}"),
    "of matrix rate": format_value("share_of_matrix_rate", lambda share: f"{100 * share:.0f} %"),
}


def table(result: Values, omit: Sequence[str] = ()) -> list[list[str]]:
    """The cells of a result, header first, without empty or omitted columns and repeated names of cases."""
    kept = {title: cell for title, cell in COLUMNS.items() if title not in omit}
    columns = {title: [cell(row) for row in result["rows"]] for title, cell in kept.items()}
    cases = columns["case"]
    columns["case"] = [case if case != before else "" for before, case in zip(["", *cases], cases, strict=False)]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def remarks(result: Values) -> list[str]:
    """Lines about the machine, and the notes of the benchmark."""
    machine, rates = result["machine"], result["floor"]
    kind = machine.get("gpu") or f"{machine['cpu_capability']}, bf16 {'in hardware' if machine['bf16'] else 'emulated'}"
    speeds = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items() if name != "copy")
    return [
        f"{machine['cpu']} ({kind}), {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['ram_gb']:.0f} GB; torch {machine['torch']}; load average {machine['load']}",
        f"matrix products: {speeds}; copy: {rates['copy'] / 1e9:,.1f} GB/s",
        *result["notes"],
    ]


def plot_scale(result: Values, folder: Path) -> list[Path]:
    """A picture for each varied parameter: time and peak memory of a step against it."""
    rows, made = [row for row in result["rows"] if row["point"]], []
    for vary in dict.fromkeys(row["point"]["vary"] for row in rows):
        path = folder / f"benchmarks_{vary}.png"
        plot_sweep(vary, [row for row in rows if row["point"]["vary"] == vary], path)
        made.append(path)
    return made


def plot_sweep(vary: str, rows: Sequence[Values], path: Path) -> None:
    figure = new_figure(9, 3.4)
    panels: dict[str, Callable[[Values], float]] = {
        "seconds per step": lambda row: row["median"],
        "peak of a step, GiB": lambda row: row["work"]["peak_bytes"] / 2**30,
    }
    ticks = list(dict.fromkeys(row["point"]["value"] for row in rows))
    labels = [COLUMNS["side"](row).replace(f", {vary} {row['point']['value']}", "") for row in rows]
    for axes, (title, of) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for side in dict.fromkeys(labels):
            points = [row for row, label in zip(rows, labels, strict=True) if label == side]
            places = [ticks.index(row["point"]["value"]) for row in points]
            axes.plot(places, [of(row) for row in points], marker="o", label=side)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
        axes.set_xlabel(vary, fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8.5, frameon=False)
    save_figure(figure, path)


BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(document: str, render: Callable[[str], str | None]) -> str:
    """The document with render(NAME) between `<!-- bench: NAME -->` and `<!-- end -->`; None: unchanged."""

    def block(match: re.Match) -> str:
        text = render(match[2])
        return match[0] if text is None else f"{match[1]}{text}{match[3]}"

    return BLOCK.sub(block, document)
