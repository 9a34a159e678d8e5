"""Progress bars."""

from __future__ import annotations


def disable_bar(show: bool) -> bool | None:
    """tqdm's `disable` argument: True hides the bar; None shows it on a terminal only."""
    return None if show else True
