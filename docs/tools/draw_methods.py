"""Draw the diagrams of docs/methods.md, one per method: views, networks, labels, losses and the data flow.

python docs/tools/draw_methods.py [FOLDER]     # default: docs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

KINDS = {  # of a box -> fill and border
    "view": ("#e8f0fe", "#3b6fc4"),
    "net": ("#e3f4e6", "#2f8f4a"),
    "frozen": ("#f1e6fb", "#8a4fc4"),
    "label": ("#fdf3d0", "#b98a10"),
    "op": ("#f0f1f3", "#6f757b"),
    "loss": ("#fce6e3", "#c2453a"),
}
LINES = {  # style and color
    "signal": ("-", "#3c4043"),
    "label": ((0, (4, 2.5)), "#b98a10"),
    "average": ((0, (1, 1.6)), "#8a4fc4"),
}
WIDTH, HEIGHT = 2.35, 0.72  # of a box; columns and rows are STEP apart
STEP = (2.9, 1.0)
INK = "#202124"


@dataclass(frozen=True)
class Box:
    """A box of a diagram.

    Args:
        kind: key of KINDS.
        column, row: position of the center.
        text: label.
        span: number of rows."""

    kind: str
    column: float
    row: float
    text: str
    span: float = 1

    @property
    def center(self) -> tuple[float, float]:
        return self.column * STEP[0], -(self.row + (self.span - 1) / 2) * STEP[1]

    @property
    def half(self) -> tuple[float, float]:
        return WIDTH / 2, (HEIGHT + (self.span - 1) * STEP[1]) / 2


@dataclass(frozen=True)
class Arrow:
    """An arrow between two boxes; line: signal, label or average."""

    start: str
    end: str
    line: str = "signal"


Sketch = tuple[dict[str, Box], list[Arrow]]


def supervised() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nstrong view"),
        "net": Box("net", 1, 0, "network"),
        "mask": Box("label", 1, 1, "mask"),
        "loss": Box("loss", 2, 0, "loss_x"),
    }
    return boxes, [Arrow("x", "net"), Arrow("net", "loss"), Arrow("mask", "loss", "label")]


def selftrain() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nstrong view"),
        "u": Box("view", 0, 1, "unlabeled image\nweak view"),
        "net": Box("net", 1, 0, "network", span=2),
        "eval": Box("frozen", 1, 2, "the same network\nevaluation mode"),
        "label": Box("label", 2, 2, "most likely class\nof every pixel"),
        "loss_x": Box("loss", 3, 0, "loss_x  (mask)"),
        "loss_u": Box("loss", 3, 1, "loss_u"),
    }
    arrows = [Arrow("x", "net"), Arrow("u", "net"), Arrow("u", "eval"), Arrow("eval", "label")]
    return boxes, [*arrows, Arrow("net", "loss_x"), Arrow("net", "loss_u"), Arrow("label", "loss_u", "label")]


def fixmatch() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s": Box("view", 0, 1, "unlabeled image\nstrong view, CutMix"),
        "w": Box("view", 0, 2, "unlabeled image\nweak view"),
        "net": Box("net", 1, 0, "network", span=3),
        "eval": Box("frozen", 1, 3, "the same network\nevaluation mode"),
        "own": Box("label", 2, 2, "label where\nconfidence ≥ τ"),
        "pasted": Box("label", 2, 3, "label of the\npasted region"),
        "mix": Box("op", 3, 2.5, "the same\nCutMix boxes"),
        "loss_x": Box("loss", 4, 0, "loss_x  (mask)"),
        "loss_u": Box("loss", 4, 1, "loss_u"),
    }
    signals = [("x", "net"), ("s", "net"), ("w", "net"), ("w", "eval"), ("net", "own"), ("eval", "pasted")]
    labels = [("own", "mix"), ("pasted", "mix"), ("mix", "loss_u")]
    return boxes, lines(signals, labels) + [Arrow("net", "loss_x"), Arrow("net", "loss_u")]


def unimatch() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s1": Box("view", 0, 2, "unlabeled image\nstrong view 1, CutMix"),
        "s2": Box("view", 0, 3, "unlabeled image\nstrong view 2, CutMix"),
        "w": Box("view", 0, 4, "unlabeled image\nweak view"),
        "net": Box("net", 1, 0, "network", span=5),
        "eval": Box("frozen", 1, 5, "the same network\nevaluation mode"),
        "drop": Box("op", 2, 1, "weak view's features,\nchannels dropped"),
        "own": Box("label", 2, 4, "label where\nconfidence ≥ τ"),
        "pasted": Box("label", 2, 5, "label of the\npasted region"),
        "mix": Box("op", 3, 4.5, "the same\nCutMix boxes"),
        "loss_x": Box("loss", 4, 0, "loss_x  (mask)"),
        "fp": Box("loss", 4, 1, "loss_u_fp"),
        "ls1": Box("loss", 4, 2, "loss_u_s1"),
        "ls2": Box("loss", 4, 3, "loss_u_s2"),
    }
    signals = [("x", "net"), ("s1", "net"), ("s2", "net"), ("w", "net"), ("w", "eval"), ("net", "drop"), ("drop", "fp")]
    signals += [("net", "own"), ("eval", "pasted"), ("net", "loss_x"), ("net", "ls1"), ("net", "ls2")]
    labels = [("own", "fp"), ("own", "mix"), ("pasted", "mix"), ("mix", "ls1"), ("mix", "ls2")]
    return boxes, lines(signals, labels)


def unimatch_v2() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s1": Box("view", 0, 1, "unlabeled image\nstrong view 1, CutMix"),
        "s2": Box("view", 0, 2, "unlabeled image\nstrong view 2, CutMix"),
        "w": Box("view", 0, 3, "unlabeled image\nweak view"),
        "net": Box("net", 1, 0, "network", span=3),
        "teacher": Box("frozen", 1, 3, "EMA teacher"),
        "m1": Box("op", 2, 1, "random half of the\nfeature channels"),
        "m2": Box("op", 2, 2, "the other half"),
        "label": Box("label", 2, 3, "label where\nconfidence ≥ τ"),
        "mix": Box("op", 3, 3, "the same\nCutMix boxes"),
        "loss_x": Box("loss", 4, 0, "loss_x  (mask)"),
        "ls1": Box("loss", 4, 1, "loss_u_s1"),
        "ls2": Box("loss", 4, 2, "loss_u_s2"),
    }
    signals = [("x", "net"), ("s1", "net"), ("s2", "net"), ("w", "teacher"), ("teacher", "label"), ("net", "loss_x")]
    signals += [("net", "m1"), ("net", "m2"), ("m1", "ls1"), ("m2", "ls2")]
    labels = [("label", "mix"), ("mix", "ls1"), ("mix", "ls2")]
    return boxes, [*lines(signals, labels), Arrow("net", "teacher", "average")]


def imas() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s": Box("view", 0, 1, "unlabeled image\nstrong view"),
        "w": Box("view", 0, 2, "unlabeled image\nweak view"),
        "mix": Box("op", 2, 1, "e·strong + (1−e)·weak\nand CutMix of weak"),
        "eval": Box("frozen", 1, 3, "the same network\nevaluation mode"),
        "teacher": Box("frozen", 1, 4, "EMA teacher"),
        "e": Box("op", 2, 3, "easiness e:\nagreement of the two"),
        "label": Box("label", 2, 4, "label where\nconfidence ≥ τ"),
        "net": Box("net", 3, 0, "network", span=2),
        "loss_x": Box("loss", 4, 0, "loss_x  (mask)"),
        "loss_u": Box("loss", 4, 1, "e × loss_u"),
    }
    signals = [("x", "net"), ("s", "mix"), ("w", "mix"), ("w", "eval"), ("w", "teacher"), ("eval", "e")]
    signals += [("teacher", "e"), ("teacher", "label"), ("mix", "net"), ("net", "loss_x"), ("net", "loss_u")]
    return boxes, lines(signals, [("e", "mix"), ("e", "loss_u"), ("label", "loss_u")])


def maskmatch() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s": Box("view", 0, 1, "unlabeled image\nstrong view, CutMix"),
        "m": Box("view", 0, 2, "unlabeled image\n70 % of it masked"),
        "w": Box("view", 0, 3, "unlabeled image\nweak, three scales"),
        "net": Box("net", 1, 0, "network", span=3),
        "teacher": Box("frozen", 1, 3, "EMA teacher"),
        "mean": Box("op", 2, 3, "mean of the\nprobabilities"),
        "label": Box("label", 3, 3, "label where\nconfidence ≥ τ"),
        "loss_x": Box("loss", 4, 0, "loss_x  (mask)"),
        "ls": Box("loss", 4, 1, "loss_u_s"),
        "lcr": Box("loss", 4, 2, "loss_u_lcr"),
    }
    signals = [("x", "net"), ("s", "net"), ("m", "net"), ("w", "teacher"), ("teacher", "mean"), ("mean", "label")]
    signals += [("net", "loss_x"), ("net", "ls"), ("net", "lcr")]
    return boxes, [*lines(signals, [("label", "ls"), ("label", "lcr")]), Arrow("net", "teacher", "average")]


def pseudoseg() -> Sketch:
    boxes = {
        "x": Box("view", 0, 0, "labeled image\nweak view"),
        "s": Box("view", 0, 1, "unlabeled image\nstrong view, cutout"),
        "w": Box("view", 0, 2.5, "unlabeled image\nweak view"),
        "net": Box("net", 1, 0, "network, classifier,\nself-attention", span=2),
        "eval": Box("frozen", 1, 2, "the same\nin evaluation mode", span=2),
        "decoder": Box("op", 2, 2, "prediction of\nthe decoder"),
        "cam": Box("op", 2, 3, "Grad-CAM, refined\nby self-attention"),
        "label": Box("label", 3, 2.5, "normalized, averaged,\nsharpened"),
        "loss_x": Box("loss", 4, 0, "loss_x + loss_sgc\n+ loss_cls  (mask)"),
        "loss_u": Box("loss", 4, 1, "loss_u, soft"),
    }
    signals = [("x", "net"), ("s", "net"), ("w", "eval"), ("eval", "decoder"), ("eval", "cam"), ("net", "loss_x")]
    signals += [("net", "loss_u"), ("decoder", "label"), ("cam", "label")]
    return boxes, lines(signals, [("label", "loss_u")])


def allspark(revised: bool = False) -> Sketch:
    views = ("weak", "strong view, CutMix") if revised else ("strong", "weak view")
    memory = "memory: channels\nper class" if not revised else "memory: written\nchannels per class"
    boxes = {
        "x": Box("view", 0, 0, f"labeled image\n{views[0]} view"),
        "u": Box("view", 0, 2, f"unlabeled image\n{views[1]}"),
        "encoder": Box("net", 1, 0, "encoder", span=3),
        "cx": Box("op", 2, 0, "channels of the\nlabeled image"),
        "cu": Box("op", 2, 2, "channels of the\nunlabeled image"),
        "cross": Box("net", 3, 0, "reconstructed by\ncross-attention"),
        "memory": Box("op", 3, 1, memory),
        "self": Box("net", 3, 2, "self-attention"),
        "decoder": Box("net", 4, 0, "decoder", span=3),
        "loss_x": Box("loss", 5, 0, "loss_x  (mask)"),
        "loss_u": Box("loss", 5, 2, "loss_u"),
        "who": Box("frozen", 1, 3, "EMA teacher" if revised else "the same network\nevaluation mode"),
        "label": Box("label", 2, 3, "label where\nconfidence ≥ τ" if revised else "most likely class\nof every pixel"),
    }
    signals = [("x", "encoder"), ("u", "encoder"), ("encoder", "cx"), ("encoder", "cu"), ("cx", "cross")]
    signals += [("cu", "memory"), ("cu", "self"), ("memory", "cross"), ("cross", "decoder"), ("self", "decoder")]
    signals += [("decoder", "loss_x"), ("decoder", "loss_u"), ("who", "label")]
    arrows = [*lines(signals, [("label", "loss_u"), ("label", "memory")])]
    if not revised:
        return boxes, [*arrows, Arrow("u", "who")]
    boxes["w"] = Box("view", 0, 3, "the same image\nweak view")
    return boxes, [*arrows, Arrow("w", "who"), Arrow("encoder", "who", "average")]


def lines(signals: list[tuple[str, str]], labels: list[tuple[str, str]]) -> list[Arrow]:
    return [Arrow(*pair) for pair in signals] + [Arrow(*pair, "label") for pair in labels]


METHODS = {
    "supervised": supervised,
    "selftrain": selftrain,
    "fixmatch": fixmatch,
    "unimatch": unimatch,
    "unimatch_v2": unimatch_v2,
    "imas": imas,
    "maskmatch": maskmatch,
    "pseudoseg": pseudoseg,
    "allspark": allspark,
    "allspark_revised": lambda: allspark(revised=True),
}


def draw_box(axes: Axes, box: Box) -> None:
    fill, border = KINDS[box.kind]
    (x, y), (half_width, half_height) = box.center, box.half
    corner = (x - half_width, y - half_height)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, 2 * half_width, 2 * half_height, boxstyle=style, fc=fill, ec=border, lw=1.3))
    axes.text(x, y, box.text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.25)


def ends(first: Box, last: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end point of an arrow: from side to side, or vertical; horizontal if possible."""
    (x1, y1), (x2, y2) = first.center, last.center
    if abs(x2 - x1) < WIDTH:
        down = 1 if y2 < y1 else -1
        return (x1, y1 - down * first.half[1]), (x2, y2 + down * last.half[1])
    if abs(y2 - y1) < first.half[1]:  # the first is the taller one
        y1 = y2
    elif abs(y2 - y1) < last.half[1]:
        y2 = y1
    right = 1 if x2 > x1 else -1
    return (x1 + right * first.half[0], y1), (x2 - right * last.half[0], y2)


def draw_arrow(axes: Axes, arrow: Arrow, boxes: dict[str, Box], turned: list[str]) -> None:
    """Draw an arrow. A label that comes from below bends up to its loss if nothing is under the loss.

    Args:
        turned: losses that bent arrows already lead to; the next one ends beside them.
    """
    first, last = boxes[arrow.start], boxes[arrow.end]
    (x1, y1), (x2, y2) = ends(first, last)
    bend = "arc3"
    if arrow.line == "label" and y1 < y2 - 0.5:
        if is_free_below(last, boxes.values()):
            x2, y2 = last.center[0] + 0.5 * turned.count(arrow.end), last.center[1] - last.half[1]
            bend = "angle,angleA=0,angleB=90,rad=6"
            turned.append(arrow.end)
        elif last.column > first.column:
            y2 -= 0.2  # below the signal's head
    style, color = LINES[arrow.line]
    axes.add_patch(
        FancyArrowPatch(
            (x1, y1),
            (x2, y2),
            connectionstyle=bend,
            arrowstyle="-|>",
            mutation_scale=11,
            linestyle=style,
            color=color,
            lw=1.3,
            shrinkA=0,
            shrinkB=1,
        )
    )


def is_free_below(loss: Box, boxes: Iterable[Box]) -> bool:
    return loss.kind == "loss" and not any(box.column == loss.column and box.row > loss.row for box in boxes)


def draw(sketch: Sketch, path: Path) -> None:
    boxes, arrows = sketch
    right = max(box.center[0] for box in boxes.values()) + WIDTH / 2
    bottom = min(box.center[1] - box.half[1] for box in boxes.values())
    height = -bottom + HEIGHT / 2 + 0.75
    figure = plt.figure(figsize=((right + WIDTH / 2 + 0.4) * 0.72, height * 0.72), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-WIDTH / 2 - 0.2, right + 0.2), ylim=(bottom - 0.65, HEIGHT / 2 + 0.1))
    axes.axis("off")
    turned: list[str] = []
    for arrow in arrows:
        draw_arrow(axes, arrow, boxes, turned)
    for box in boxes.values():
        draw_box(axes, box)
    names = {"signal": "data", "label": "label or weight", "average": "moving average"}
    used = dict.fromkeys(arrow.line for arrow in arrows)
    handles = [Line2D([], [], linestyle=LINES[name][0], color=LINES[name][1], lw=1.5) for name in used]
    axes.legend(
        handles, [names[name] for name in used], loc="lower left", ncols=3, frameon=False, fontsize=9, borderaxespad=0.2
    )
    figure.savefig(path)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main(folder: Path) -> None:
    for name, sketch in METHODS.items():
        draw(sketch(), folder / f"method_{name}.png")
        print(folder / f"method_{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
