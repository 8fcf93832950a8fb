"""The learning rate's schedule as Detectron2 takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

from dyhead.runs.schedule import learning_rate_factor


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """The schedule of :func:`dyhead.runs.schedule.learning_rate_factor`, also where Detectron2's own ends in an error.

    Detectron2 asks for a learning rate after the last iteration, too; it is that of the last one.
    """
    factor, last = learning_rate_factor(cfg), cfg.SOLVER.MAX_ITER - 1

    def factor_at(where: float) -> float:
        return factor(min(round(where * cfg.SOLVER.MAX_ITER), last))

    return LRMultiplier(optimizer, multiplier=_Schedule(factor_at), max_iter=cfg.SOLVER.MAX_ITER)


class _Schedule(ParamScheduler):
    """A function of the part of the training that is over, 0 to 1, as Detectron2 wants it."""

    def __init__(self, factor_at: Callable[[float], float]) -> None:
        self._factor_at = factor_at

    def __call__(self, where: float) -> float:
        return self._factor_at(where)
