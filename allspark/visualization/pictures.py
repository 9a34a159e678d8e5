"""Drawing masks, comparison grids and curves."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from allspark.data.image_files import open_limited
from allspark.utils.atomic import atomic_path
from allspark.utils.errors import UserError

if TYPE_CHECKING:  # imported only when a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Palette = Sequence[tuple[int, int, int]]
Picture = Tensor | np.ndarray  # image (3, H, W) or mask (H, W), uint8, on the CPU
Points = Sequence[tuple[int, float]]  # (step, value) with unique steps

NO_CLASS_COLOR = (255, 255, 255)  # of ignored pixels and unknown values; black would look like background
MARGIN = 20  # pixels around a page
SOFTWARE = "AllSpark"  # written into every PNG; only files with this mark are ever replaced
INK, LIGHT_INK, PAPER = (32, 33, 36), (120, 124, 130), (255, 255, 255)
COLORS = (*(f"C{index}" for index in range(10)), "black")  # then again with the next line style
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
GRID_COLUMNS = 9  # of a comparison grid; more are split into bands
PANEL_COLUMNS = 4  # panels of curves per row
MAX_ROWS_IN_PANEL = 6  # curves drawn with the legend inside and the y axis from zero; more curves use the full height


def colorize(mask: Picture, palette: Palette) -> np.ndarray:
    """Class indices (H, W) -> RGB (H, W, 3) uint8; values without a class, such as the ignore index, are white."""
    return full_palette(palette)[np.asarray(mask)]


def full_palette(palette: Palette) -> np.ndarray:
    """A color for each uint8 value: (256, 3) uint8."""
    colors = np.full((256, 3), NO_CLASS_COLOR, dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors


def has_color(palette: Palette) -> np.ndarray:
    """Which uint8 values are a class with a color: (256,) bool. Black does not count; it is usually background."""
    return full_palette(palette).any(axis=1) & (np.arange(256) < len(palette))


def overlay(image: Picture, mask: Picture, palette: Palette, alpha: float = 0.55) -> np.ndarray:
    """Blend the mask over the image -> (H, W, 3) uint8; borders of a class are opaque.

    Pixels without a class or of a black class show the image unchanged.
    """
    mask = np.asarray(mask)
    photo, color = to_rgb(image).astype(np.float32), colorize(mask, palette).astype(np.float32)
    weight = np.where(find_borders(mask), 1.0, alpha) * has_color(palette)[mask]
    return np.rint(photo + weight[..., None] * (color - photo)).astype(np.uint8)


def find_borders(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, True if the pixel to the right or below has a different value."""
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    return edge


def to_rgb(image: Picture) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3) uint8: the first three channels; of one or two the first, in gray."""
    channels = np.asarray(image)
    return channels[[0, 1, 2] if len(channels) >= 3 else [0, 0, 0]].transpose(1, 2, 0)


def save_index_png(mask: Picture, palette: Palette, path: Path) -> None:
    """Write a PNG with the class indices as pixel values, which viewers show in color (mode P)."""
    save_image(index_picture(mask, palette), path)


def index_picture(mask: Picture, palette: Palette) -> Image.Image:
    """The class indices (H, W) with a palette (mode P)."""
    picture = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    picture.putpalette(full_palette(palette).tobytes())
    return picture


def save_pixels(pixels: Picture, path: Path) -> None:
    """Write (H, W, 3) RGB or (H, W) gray uint8 as an image file."""
    save_image(Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)), path)


def save_image(picture: Image.Image, path: Path) -> None:
    """Write an image in the format of the suffix; a PNG is marked as ours. UserError if it cannot be written."""
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    with atomic_path(path, "free disk space or choose another path") as temporary:
        picture.save(temporary, pnginfo=mark)


def is_own_file(path: Path) -> bool:
    """Whether save_image wrote this file."""
    try:
        with open_limited(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def check_picture(path: Path, option: str) -> None:
    """UserError unless save_image may write this .png file: a new one, or one that it wrote."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{option} {path}: must end in .png")
    if os.path.lexists(path) and not is_own_file(path):
        raise UserError(f"{option} {path}: exists and was not written by this program; choose another name")


@dataclass(frozen=True)
class GridRow:
    """A row of a comparison grid: image (3, H, W), then the truth and one or more predictions (H, W)."""

    name: str
    image: Picture
    masks: tuple[Picture, ...]


def draw_grid(
    examples: Sequence[GridRow],
    heads: Sequence[str],
    classes: Sequence[str],
    palette: Palette,
    *,
    panel_width: int = 320,
    overlaid: bool = False,
) -> Image.Image:
    """Draw a row of panels per example under column titles, and a legend of the classes that occur.

    Args:
        heads: column titles for the image and each mask, such as ("image", "truth", "supervised", "AllSpark").
        overlaid: draw masks over the image.
    """
    bands = []  # below each other, each with image and truth
    for chosen in np.array_split(range(2, len(heads)), max(1, math.ceil((len(heads) - 2) / (GRID_COLUMNS - 2)))):
        names = [*heads[:2], *(heads[column] for column in chosen)]
        rows = [replace(e, masks=(e.masks[0], *(e.masks[column - 1] for column in chosen))) for e in examples]
        bands.append(draw_band(rows, names, palette, panel_width, overlaid))
    legend = draw_legend(examples, classes, palette, bands[0].width - 2 * MARGIN)
    page = Image.new("RGB", (bands[0].width, sum(band.height for band in bands) + legend.height + MARGIN), PAPER)
    top = 0
    for band in bands:
        page.paste(band, (0, top))
        top += band.height
    page.paste(legend, (MARGIN, top))
    return page


def draw_band(
    examples: Sequence[GridRow], heads: Sequence[str], palette: Palette, panel_width: int, overlaid: bool
) -> Image.Image:
    """All examples below each other, under one line of column titles."""
    gap, head, caption = 8, 34, 24
    rows = [example_panels(example, palette, panel_width, overlaid) for example in examples]
    width = 2 * MARGIN + len(heads) * panel_width + (len(heads) - 1) * gap
    page = Image.new("RGB", (width, MARGIN + head + sum(row[0].height + caption for row in rows)), PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [MARGIN + column * (panel_width + gap) for column in range(len(heads))]
    widest = max(draw.textlength(text, font(18)) for text in heads)
    for left, text in zip(lefts, heads, strict=True):  # smaller font if the longest title would touch the next
        draw.text((left, MARGIN), text, INK, font(min(18, max(8, int(18 * panel_width / widest)))))
    top = MARGIN + head
    for example, panels in zip(examples, rows, strict=True):
        for left, panel in zip(lefts, panels, strict=True):
            page.paste(panel, (left, top))
            # a thin frame, because ignored pixels are white like the page
            draw.rectangle((left - 1, top - 1, left + panel.width, top + panel.height), outline=(214, 216, 220))
        top += panels[0].height
        draw.text((MARGIN, top + 4), example.name, LIGHT_INK, font(12))
        top += caption
    return page


def example_panels(example: GridRow, palette: Palette, width: int, overlaid: bool) -> list[Image.Image]:
    """The image, and each mask in color or over the image, all scaled to `width` pixels."""
    photo = Image.fromarray(to_rgb(example.image))
    size = (width, max(1, round(photo.height * width / photo.width)))
    if overlaid:
        masks = [overlay(example.image, mask, palette) for mask in example.masks]
    else:
        masks = [colorize(mask, palette) for mask in example.masks]
    resample = Image.Resampling.LANCZOS if overlaid else Image.Resampling.NEAREST
    panels = [Image.fromarray(mask).resize(size, resample) for mask in masks]
    return [photo.resize(size, Image.Resampling.LANCZOS), *panels]


def draw_legend(examples: Sequence[GridRow], classes: Sequence[str], palette: Palette, width: int) -> Image.Image:
    """Color and name of each class that occurs in a mask."""
    occurring = set().union(*(np.unique(mask).tolist() for example in examples for mask in example.masks))
    entries = [(classes[value], tuple(palette[value])) for value in sorted(occurring) if value < len(classes)]
    if any(value >= len(classes) for value in occurring):
        entries.append(("ignored", NO_CLASS_COLOR))
    return draw_names(entries, width)


def draw_names(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> Image.Image:
    """Each color with its name, in as many columns as fit into `width`."""
    swatch, line, text = 16, 26, font(14)
    cell = 2 * swatch + 12 + max((round(text.getlength(name)) for name, _ in entries), default=0)
    width = max(width, cell)
    columns = width // cell
    legend = Image.new("RGB", (width, 10 + line * -(-len(entries) // columns)), PAPER)
    draw = ImageDraw.Draw(legend)
    for index, (name, color) in enumerate(entries):
        left, top = index % columns * cell, 10 + index // columns * line
        draw.rectangle((left, top, left + swatch, top + swatch), fill=color, outline=(170, 172, 176))
        draw.text((left + swatch + 8, top + swatch / 2), name, INK, text, anchor="lm")
    return legend


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek and Cyrillic letters, the same on every machine."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def plot_curves(rows: Mapping[str, Sequence[Points]], title: str, path: Path) -> None:
    """Draw all curves into one panel and save it. rows: name -> points of each seed; see draw_rows."""
    few = len(rows) <= MAX_ROWS_IN_PANEL
    height = max(5.6, 0.2 * len(rows) + 0.8)  # space for all names beside the panel
    figure = new_figure(6.4, 4.2) if few else new_figure(11.0, height)
    axes = figure.subplots()
    draw_rows(axes, rows, title)
    if few:
        axes.set_ylim(bottom=0)
    save_figure(figure, path)


def plot_seeds(rows: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw a line of dots per row and save it. rows: name -> value of each seed; see draw_seeds."""
    figure = new_figure(7.6, 0.26 * len(rows) + 0.9)
    draw_seeds(figure.subplots(), rows, title)
    save_figure(figure, path)


def draw_seeds(axes: Axes, rows: Mapping[str, Sequence[float]], title: str) -> None:
    """A dot per seed and a bar at the mean, one line per row; a band marks the first row's range."""
    for y, values in enumerate(rows.values()):
        axes.plot(values, [y] * len(values), "o", color=COLORS[0], markersize=5, alpha=0.65, markeredgewidth=0)
        axes.plot(np.mean(values), y, "|", color="black", markersize=11, markeredgewidth=1.6)
    first = next(iter(rows.values()))
    axes.axvspan(min(first), max(first), color=COLORS[0], alpha=0.12, linewidth=0)
    style_axes(axes, title, xlabel="")
    axes.set_yticks(range(len(rows)), [f"{name}  {np.mean(values):.1f}" for name, values in rows.items()])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def plot_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw the share of each predicted class (columns) in the pixels of each labeled class (rows), and save it."""
    counts = np.array(confusion, float)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(4.0, min(0.36, 24 / len(classes)) * len(classes) + 2.0)  # inches; at most 26, for any number of classes
    figure = new_figure(size + 0.6, size)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(share, cmap="Blues", vmin=0, vmax=100), ax=axes, shrink=0.7, label="% of the label")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="prediction", ylabel="label")
    axes.tick_params(labelsize=8)
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
        value = share[row, column]
        color = "white" if value > 60 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)


def plot_losses(rows: Mapping[str, Sequence[Mapping[str, Points]]], path: Path) -> None:
    """Draw the losses of each row into a panel of its own and save them. rows: name -> losses by name of each seed."""
    figure, places = new_panels(len(rows), 3.4, 2.7)
    for axes, (name, seeds) in zip(places, rows.items(), strict=True):
        draw_losses(axes, seeds, "\n".join(textwrap.wrap(name, 34)))
    save_figure(figure, path)


def plot_panels(panels: Mapping[str, Mapping[str, Sequence[Points]]], path: Path) -> None:
    """Draw panels and save them. panels: title -> name -> points of each seed.

    With few curves each panel has a legend with the last values, with many there is one legend below all panels.
    """
    many = max(map(len, panels.values()), default=0) > MAX_ROWS_IN_PANEL
    figure, places = new_panels(len(panels), 5.5, 3.8, below=1.2 * many)
    lines_by_name = {}
    for (title, rows), axes in zip(panels.items(), places, strict=True):
        lines_by_name |= draw_rows(axes, rows, title, legend=not many)
        low, high = axes.get_ylim()
        top = min(max(high, low + 5.0), max(high, 101.0))  # so that a class at 0 is a flat line
        axes.set_ylim(min(low, top - 5.0), top)
    if many:
        columns = 2 * min(len(panels), PANEL_COLUMNS)
        legend = dict(loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
        figure.legend(lines_by_name.values(), lines_by_name, **legend)
    save_figure(figure, path)


def draw_rows(axes: Axes, rows: Mapping[str, Sequence[Points]], title: str, legend: bool = True) -> dict[str, Line2D]:
    """Draw a curve per row, the mean of its seeds with a band from lowest to highest; the legend has the last value.

    Returns:
        The line of each row that has points.
    """
    lines, styles = {}, line_styles(rows)
    for name, seeds in rows.items():
        steps, values = stack_seeds(seeds)
        if not steps:
            continue
        mean, style = values.mean(0), styles[name]
        (lines[name],) = axes.plot(steps, mean, markersize=3.5, linewidth=1.8, label=f"{name}  {mean[-1]:.1f}", **style)
        fill_range(axes, steps, values, style["color"], alpha=0.15 if len(rows) <= MAX_ROWS_IN_PANEL else 0.06)
    style_axes(axes, title, legend=legend, outside=len(rows) > MAX_ROWS_IN_PANEL)
    return lines


def line_styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Color, line and marker of each row, unique as long as possible. NAME+MORE gets NAME's color."""
    colors: dict[str, str] = {}
    styles: dict[str, dict[str, str]] = {}
    for name in names:
        color = colors.setdefault(name.partition("+")[0], COLORS[len(colors) % len(COLORS)])
        options = (dict(color=color, linestyle=line, marker=marker) for line, marker in LINES)
        styles[name] = next((style for style in options if style not in styles.values()), dict(color=color))
    return styles


def draw_losses(axes: Axes, seeds: Sequence[Mapping[str, Points]], title: str) -> None:
    """Draw each loss smoothed; for a single seed also unsmoothed."""
    for index, loss in enumerate(dict.fromkeys(name for losses in seeds for name in losses)):
        steps, values = stack_seeds([losses.get(loss, ()) for losses in seeds])
        if not steps:
            continue
        smoothed, color = np.array([smooth(row) for row in values]), COLORS[index % len(COLORS)]
        axes.plot(steps, smoothed.mean(0), linewidth=1.6, label=loss, color=color)
        fill_range(axes, steps, smoothed, color, alpha=0.15)
        if len(values) == 1:
            axes.plot(steps, values[0], linewidth=0.8, alpha=0.25, color=color)
    style_axes(axes, title)


def stack_seeds(seeds: Sequence[Points]) -> tuple[list[int], np.ndarray]:
    """Steps that all seeds with points have in common, and the values there (seeds, steps).

    A mean over a changing set of seeds would jump where one of them ends.
    """
    by_step = [dict(points) for points in seeds if points]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    return steps, np.array([[points[step] for step in steps] for points in by_step])


def fill_range(axes: Axes, steps: Sequence[int], values: np.ndarray, color: str, alpha: float) -> None:
    """Fill from the lowest to the highest seed; values: (seeds, steps)."""
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=alpha, linewidth=0)


def new_panels(count: int, width: float, height: float, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with panels of so many inches, PANEL_COLUMNS side by side, and `below` inches under them."""
    columns = min(count, PANEL_COLUMNS)
    lines = math.ceil(count / columns)
    figure = new_figure(width * columns, height * lines + below)
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in places[count:]:
        axes.set_visible(False)
    return figure, places[:count]


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without pyplot: needs no display and shares no state with the caller."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names may contain $
    return Figure(figsize=(width, height), layout="constrained", dpi=140)


def save_figure(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_image(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def style_axes(axes: Axes, title: str, legend: bool = True, outside: bool = False, xlabel: str = "step") -> None:
    """Title, light grid, no box, and a legend if there are labels."""
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = [line for line in axes.get_lines() if not line.get_label().startswith("_child")]
    if legend and drawn:
        place = dict(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5) if outside else {}
        axes.legend(drawn, [line.get_label() for line in drawn], fontsize=8.5, frameon=False, **place)


def smooth(values: Sequence[float]) -> list[float]:
    """Bias-corrected exponential moving average with decay 0.8."""
    decay, smoothed, mean, weight = 0.8, [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight)
    return smoothed
