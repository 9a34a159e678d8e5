"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def escape_cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns; the first row is its header."""
    rows = [list(map(escape_cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
