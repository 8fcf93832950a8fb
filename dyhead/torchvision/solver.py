"""Optimizer and gradient clipping, as Detectron2 defines them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

_NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm),
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW on the parameters of ``model`` that are trained.

    Normalisation layers decay by ``WEIGHT_DECAY_NORM``; parameters called bias decay by ``WEIGHT_DECAY_BIAS``, where
    that is set, and learn ``BIAS_LR_FACTOR`` times as fast.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if isinstance(module, _NORMALISATIONS):
                decay = solver.WEIGHT_DECAY_NORM
            if name == "bias":
                lr *= solver.BIAS_LR_FACTOR
                decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
            groups[lr, decay].append(parameter)
    parameters = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(parameters, lr=solver.BASE_LR)
    return torch.optim.SGD(parameters, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)


def clip_gradients(cfg: CfgNode, parameters: Iterable[Tensor]) -> None:
    """Clip gradients in place as ``SOLVER.CLIP_GRADIENTS`` says.

    "value" clips every number, "norm" the norm of each parameter's gradient, "full_model" that of all together.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return
    if clip.CLIP_TYPE == "value":
        clip_grad_value_(parameters, clip.CLIP_VALUE)
    elif clip.CLIP_TYPE == "full_model":
        clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        for parameter in parameters:
            clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
