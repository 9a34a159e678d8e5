"""Where a run is in its training, and whether it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from allspark.config import Recipe


@dataclass(frozen=True)
class Position:
    """Training position: `step` optimizer steps done, in `epoch`.

    `epoch` is incremented after the evaluation, so after an epoch's last step it still names that epoch.

    Args:
        epoch: current epoch, from 0.
        step: optimizer steps done in all epochs.
        best: mIoU and epoch of the best evaluation so far.
        world_size: number of processes of the run so far; None for a new run.
    """

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"miou": -1.0, "epoch": -1})
    world_size: int | None = None

    def next_step(self) -> Position:
        return replace(self, step=self.step + 1)

    def next_epoch(self) -> Position:
        return replace(self, epoch=self.epoch + 1)

    def with_score(self, miou: float) -> Position:
        """After an evaluation of this epoch."""
        improved = miou > self.best["miou"]
        return replace(self, best={"miou": miou, "epoch": self.epoch}) if improved else self


def is_finished(recipe: Recipe, position: Position) -> bool:
    """Whether the run ends before the epoch of this position: after the last one, or by early stopping."""
    patience, waited = recipe.evaluation.patience, position.epoch - 1 - position.best["epoch"]
    return position.epoch >= recipe.epochs or (patience is not None and waited >= patience)
