"""The figures of `allspark compare`: bands, dots, colors, legends, grids."""

import numpy as np
import pytest
from PIL import Image

from allspark.visualization import pictures


def test_curve_band_is_min_to_max():
    axes = pictures.new_figure(4, 3).subplots()
    seeds = [[(1, 10.0), (2, 20.0), (3, 99.0)], [(1, 13.0), (2, 26.0)], []]  # one stopped early, one has nothing
    pictures.draw_rows(axes, {"mine": seeds, "one": [[(1, 5.0), (2, 6.0)]], "none": [[]]}, "title")
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 11.5], [2, 23]], [[1, 5], [2, 6]]]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 10), (1, 13), (2, 20), (2, 26)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mine  23.0", "one  6.0"]


def test_every_seed_is_a_dot(tmp_path):
    axes = pictures.new_figure(4, 3).subplots()
    pictures.draw_seeds(axes, {"base": [40.0, 43.0], "mine": [50.0]}, "title")
    dots, bars = axes.lines[::2], axes.lines[1::2]
    assert [line.get_xydata().tolist() for line in dots] == [[[40, 0], [43, 0]], [[50, 1]]]
    assert [line.get_xydata().tolist() for line in bars] == [[[41.5, 0]], [[50, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base  41.5", "mine  50.0"]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (40, 43) and axes.yaxis_inverted()
    for count in (1, 20):
        pictures.plot_seeds({f"row {i}": [20.0 + i] for i in range(count)}, "title", tmp_path / f"{count}.png")
    assert Image.open(tmp_path / "20.png").height > 3 * Image.open(tmp_path / "1.png").height


def test_twenty_rows_are_distinguishable(tmp_path):
    points = {f"row {index}": [[(1, 20.0 + index), (2, 25.0 + index)]] for index in range(20)}
    axes = pictures.new_figure(8, 5).subplots()
    pictures.draw_rows(axes, points, "title")
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 20
    assert len(axes.get_legend().get_texts()) == 20
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1  # beside it
    pictures.plot_curves(points, "title", tmp_path / "curves.png")
    pictures.plot_curves(
        points | {f"more {name}": seeds for name, seeds in points.items()}, "title", tmp_path / "40.png"
    )
    assert Image.open(tmp_path / "40.png").height > 1.3 * Image.open(tmp_path / "curves.png").height
    pictures.plot_losses({name: [{"loss_x": [(1, 2.0), (2, 1.0)]}] for name in points}, tmp_path / "losses.png")
    for name in ("curves", "losses"):
        drawn = Image.open(tmp_path / f"{name}.png")
        assert drawn.width < 2.5 * drawn.height and drawn.width < 3000


def test_method_variants_share_a_color():
    names = ["a", "a+allspark", "b", "b+none", "a+more", *(f"row {index}" for index in range(10)), "row 1+allspark"]
    found = pictures.line_styles(names)
    kinds = {(look["color"], look["linestyle"]) for look in found.values()}
    assert len(kinds) == len(names)
    assert len({found[name]["color"] for name in ("a", "a+allspark", "a+more")}) == 1
    assert found["b+none"]["color"] == found["b"]["color"] != found["a"]["color"]


def test_large_panels_share_a_legend(tmp_path):
    """As wide as with few rows, and with room below the panels for every name."""
    few, many = ({f"row {i}": [[(1, 20.0 + i), (2, 25.0)]] for i in range(count)} for count in (3, 20))
    sizes = []
    for name, rows in {"few": few, "many": many}.items():
        pictures.plot_panels({f"class {i}": rows for i in range(5)}, tmp_path / f"{name}.png")
        sizes.append(Image.open(tmp_path / f"{name}.png"))
    assert sizes[0].width == sizes[1].width and 100 < sizes[1].height - sizes[0].height < 300
    bottom = np.asarray(sizes[1].convert("L"))[-150:]
    assert (bottom < 128).any(1).sum() > 40  # rows of pixels with text


def test_wide_grid_wraps():
    palette = [(10 * index, 200, 255 - 10 * index) for index in range(21)]
    masks = tuple(np.full((10, 20), index, np.uint8) for index in range(21))  # truth 0, predictions 1 to 20
    example = pictures.GridRow("a", np.zeros((3, 10, 20), np.uint8), masks)
    heads = ["image", "truth", *(f"a rather long name {index}" for index in range(1, 21))]
    page = pictures.draw_grid([example], heads, [str(index) for index in range(21)], palette, panel_width=60)
    margin, step = pictures.MARGIN, 60 + 8
    assert page.width == 2 * margin + 9 * step - 8
    band, top = margin + 34 + 30 + 24, margin + 34 + 15
    for row, shown in enumerate((range(0, 8), (0, *range(8, 15)), (0, *range(15, 21)))):
        for column, index in enumerate(shown):
            assert page.getpixel((margin + (1 + column) * step + 30, top + row * band)) == palette[index]


@pytest.mark.parametrize("name", ["Straße", "дорога", "τοίχος"])
def test_names_in_other_alphabets(name):
    """No letter is drawn as the box of a missing one."""
    box = bytes(pictures.font(14).getmask("\uffff"))
    assert all(bytes(pictures.font(14).getmask(letter)) != box for letter in name)
