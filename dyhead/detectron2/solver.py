"""The optimizer that ``SOLVER`` names; schedules are Detectron2's."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from dyhead.config import ConfigError


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
