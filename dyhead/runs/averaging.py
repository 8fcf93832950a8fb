"""The moving average of a detector's weights in training, ``SOLVER.EMA``. It is evaluated, and saved as the model.

A checkpoint holds the average as ``model``, which is what everything that reads checkpoints takes, and as ``trained``
the weights with which ``--resume`` goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

TRAINED = "trained"


class WeightAverage:
    """An exponential moving average of all weights and statistics of a model, which it starts at.

    After iteration i, from 0, a weight's average is d * average + (1 - d) * weight with d = min(decay, (1 + i) / (10 +
    i)), so that the random weights of the start do not stay in it. What is no floating point is the model's.

    Args:
        model: not wrapped in DistributedDataParallel.
        decay: from 0 to 1.

    Attributes:
        state: the averages, by the model's own keys.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.restart()

    def restart(self) -> None:
        """Begin at what the model has now."""
        self.state = {key: value.detach().clone() for key, value in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after an iteration."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages for weights while this is entered."""
        trained = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        self.apply()
        try:
            yield
        finally:
            _copy(trained, self.model)

    def apply(self) -> None:
        """Give the model the averages for weights, for good."""
        _copy(self.state, self.model)


def weight_average(cfg: CfgNode, model: nn.Module) -> WeightAverage | None:
    """The average that ``SOLVER.EMA`` asks for, if it does."""
    return WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None


@torch.no_grad()
def _copy(state: dict[str, Tensor], model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        value.copy_(state[key])
