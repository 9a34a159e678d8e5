"""Masks, comparisons and curves as pictures for people. Numbers are metrics' business, which images is the caller's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from allspark.errors import UserError

Palette = Sequence[tuple[int, int, int]]
Picture = Tensor | np.ndarray  # image (3, H, W) or mask (H, W), uint8, on the CPU

UNKNOWN = (255, 255, 255)  # ignored pixels and values without a class; black would be read as background
INK, FAINT, PAPER = (32, 33, 36), (120, 124, 130), (255, 255, 255)


def colorize(mask: Picture, palette: Palette) -> np.ndarray:
    """Class indices (H, W) -> RGB (H, W, 3) uint8; a value without a class, such as the ignore index, is UNKNOWN."""
    return full_palette(palette)[np.asarray(mask)]


def full_palette(palette: Palette) -> np.ndarray:
    """A colour for every uint8 value: (256, 3) uint8."""
    colors = np.full((256, 3), UNKNOWN, dtype=np.uint8)
    colors[: len(palette)] = palette
    return colors


def overlay(image: Picture, mask: Picture, palette: Palette, alpha: float = 0.55) -> np.ndarray:
    """The mask over the image, (H, W, 3) uint8: `alpha` of the colour inside, all of it along the borders of a class.

    Pixels without a class show the image as it is.
    """
    mask = np.asarray(mask)
    photo, color = to_rgb(image).astype(np.float32), colorize(mask, palette).astype(np.float32)
    weight = np.where(borders(mask), 1.0, alpha) * (mask < len(palette))
    return np.rint(photo + weight[..., None] * (color - photo)).astype(np.uint8)


def borders(mask: np.ndarray) -> np.ndarray:
    """True where the pixel to the right or below has another value: (H, W) bool."""
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    return edge


def to_rgb(image: Picture) -> np.ndarray:
    """(3, H, W) uint8 -> (H, W, 3) uint8."""
    return np.asarray(image).transpose(1, 2, 0)


def save_index_png(mask: Picture, palette: Palette, path: Path) -> None:
    """A PNG whose pixel values are the class indices, shown in colour by any viewer (mode P)."""
    picture = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    picture.putpalette(full_palette(palette).tobytes())
    save_image(picture, path)


def save_pixels(pixels: Picture, path: Path) -> None:
    """(H, W, 3) or grey (H, W), uint8 -> an image file as it is."""
    save_image(Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)), path)


def save_image(picture: Image.Image, path: Path) -> None:
    """The whole file, of the kind that the suffix names, or none: written beside and renamed. UserError if it fails."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(beside, kind)
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another place") from None
    finally:
        with contextlib.suppress(OSError):  # as a rule it is gone, renamed
            beside.unlink()


def triptych(image: Picture, truth: Picture, prediction: Picture, palette: Palette, gap: int = 6) -> np.ndarray:
    """Image, truth and prediction side by side: (H, 3 W + 2 gap, 3) uint8."""
    panels = [to_rgb(image), colorize(truth, palette), colorize(prediction, palette)]
    space = np.full((panels[0].shape[0], gap, 3), PAPER, dtype=np.uint8)
    return np.concatenate([panels[0], space, panels[1], space, panels[2]], axis=1)


@dataclass(frozen=True)
class Example:
    """A row of a comparison: image (3, H, W), then the truth and one or more predictions (H, W)."""

    name: str
    image: Picture
    masks: tuple[Picture, ...]


def draw_grid(
    examples: Sequence[Example],
    heads: Sequence[str],
    classes: Sequence[str],
    palette: Palette,
    *,
    panel_width: int = 320,
    overlaid: bool = False,
) -> Image.Image:
    """One row of panels per example under the column heads, and a legend of the classes that occur.

    heads: one for the image and one for each mask, such as ("image", "truth", "supervised", "AllSpark").
    overlaid: masks are laid over the image instead of standing alone.
    """
    margin, gap, head, caption = 20, 8, 34, 24
    rows = [example_panels(example, palette, panel_width, overlaid) for example in examples]
    width = 2 * margin + len(heads) * panel_width + (len(heads) - 1) * gap
    legend = draw_legend(examples, classes, palette, width - 2 * margin)
    height = margin + head + sum(row[0].height + caption for row in rows) + legend.height + margin
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    lefts = [margin + column * (panel_width + gap) for column in range(len(heads))]
    for left, text in zip(lefts, heads, strict=True):
        draw.text((left, margin), text, INK, font(18))
    top = margin + head
    for example, panels in zip(examples, rows, strict=True):
        for left, panel in zip(lefts, panels, strict=True):
            page.paste(panel, (left, top))
            # a hairline, or the white of ignored pixels has no edge on the white page
            draw.rectangle((left - 1, top - 1, left + panel.width, top + panel.height), outline=(214, 216, 220))
        top += panels[0].height
        draw.text((margin, top + 4), example.name, FAINT, font(12))
        top += caption
    page.paste(legend, (margin, top))
    return page


def example_panels(example: Example, palette: Palette, width: int, overlaid: bool) -> list[Image.Image]:
    """The image and each mask in colour or laid over the image, all scaled to `width` pixels."""
    photo = Image.fromarray(to_rgb(example.image))
    size = (width, max(1, round(photo.height * width / photo.width)))
    if overlaid:
        masks = [overlay(example.image, mask, palette) for mask in example.masks]
    else:
        masks = [colorize(mask, palette) for mask in example.masks]
    smooth_or_not = Image.Resampling.LANCZOS if overlaid else Image.Resampling.NEAREST
    drawn = [Image.fromarray(mask).resize(size, smooth_or_not) for mask in masks]
    return [photo.resize(size, Image.Resampling.LANCZOS), *drawn]


def draw_legend(examples: Sequence[Example], classes: Sequence[str], palette: Palette, width: int) -> Image.Image:
    """Colour and name of each class that occurs in a mask, in index order, in as many columns as fit `width`."""
    occurring = set().union(*(np.unique(mask).tolist() for example in examples for mask in example.masks))
    entries = [(classes[value], tuple(palette[value])) for value in sorted(occurring) if value < len(classes)]
    if any(value >= len(classes) for value in occurring):
        entries.append(("ignored", UNKNOWN))
    swatch, line, text = 16, 26, font(14)
    cell = 2 * swatch + 12 + max((round(text.getlength(name)) for name, _ in entries), default=0)
    columns = max(1, width // cell)
    legend = Image.new("RGB", (width, 10 + line * -(-len(entries) // columns)), PAPER)
    draw = ImageDraw.Draw(legend)
    for index, (name, color) in enumerate(entries):
        left, top = index % columns * cell, 10 + index // columns * line
        draw.rectangle((left, top, left + swatch, top + swatch), fill=color, outline=(170, 172, 176))
        draw.text((left + swatch + 8, top + swatch / 2), name, INK, text, anchor="lm")
    return legend


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow: the same on every machine."""
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Curve:
    """What a run logged: (step, percent) of each evaluation, and (step, value) of each logged loss by name."""

    miou: Sequence[tuple[int, float]]
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def plot_curves(runs: Mapping[str, Curve], path: Path) -> None:
    """mIoU of all runs in one panel, each run's losses in a panel of its own -> an image file."""
    # the object interface on the Agg canvas: no display, and no pyplot state shared with the caller
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_losses = {name: run for name, run in runs.items() if run.losses}
    panels = 1 + len(with_losses)
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    for name, run in runs.items():
        steps, values = zip(*run.miou, strict=True) if run.miou else ((), ())
        label = f"{name}  {values[-1]:.1f}" if values else name
        first.plot(steps, values, marker="o", markersize=3.5, linewidth=1.8, label=label)
    style_axes(first, "val mIoU (%)")
    first.set_ylim(bottom=0)
    for axes, (name, run) in zip(others, with_losses.items(), strict=True):
        for loss, points in run.losses.items():
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, smooth(values), linewidth=1.6, label=loss)
            axes.plot(steps, values, linewidth=0.8, alpha=0.25, color=line.get_color())
        style_axes(axes, f"losses: {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def style_axes(axes, title: str) -> None:
    """Title, faint grid, no box, and a legend where there is something to tell."""
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5, frameon=False)


def smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average without the pull towards the first value (bias-corrected)."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
