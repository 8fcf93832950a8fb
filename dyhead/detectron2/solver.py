"""The optimizer and the schedule that ``SOLVER`` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from dyhead.config import ConfigError
from dyhead.schedule import learning_rate_factor


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW (``SOLVER.OPTIMIZER``) with Detectron2's parameter groups and ``SOLVER.CLIP_GRADIENTS``.

    Clipping by "value" and "norm" is Detectron2's, each parameter's gradient by itself; "full_model" clips the norm of
    all gradients together.

    Raises:
        ConfigError: another optimizer or kind of clipping.
    """
    solver = cfg.SOLVER
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            parameters,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
        )
    elif solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER: expected 'SGD' or 'ADAMW', got {solver.OPTIMIZER!r}")
    return _with_clipping(solver.CLIP_GRADIENTS, cfg, optimizer)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """The schedule of :func:`dyhead.schedule.learning_rate_factor`, also where Detectron2's own ends in an error.

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


def _with_clipping(clip: CfgNode, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if not clip.ENABLED:
        return optimizer
    if clip.CLIP_TYPE in ("value", "norm"):
        return maybe_add_gradient_clipping(cfg, optimizer)
    if clip.CLIP_TYPE != "full_model":
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: expected 'value', 'norm' or 'full_model', got {clip.CLIP_TYPE!r}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clip_all(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(clip_all)
    return optimizer
