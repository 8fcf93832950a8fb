"""Trainings whose loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dyhead.config import ConfigError


class DivergedError(ConfigError, FloatingPointError):
    """A loss became infinite or NaN. The message names the iteration, the losses and what to try.

    Args:
        iteration: from 0.
        what: the losses, or what the model found.
    """

    def __init__(self, iteration: int, what: str) -> None:
        super().__init__(iteration, what)
        self.iteration = iteration
        self.what = what

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration}: the loss is infinite or NaN ({self.what}). "
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True; "
            "--resume goes on from the last checkpoint"
        )


def check_finite(iteration: int, losses: Mapping[str, float]) -> None:
    """Raise :class:`DivergedError` unless all losses of an iteration are finite."""
    if not all(map(math.isfinite, losses.values())):
        raise DivergedError(iteration, ", ".join(f"{name} {value:g}" for name, value in losses.items()))
