"""Optimizer, learning rate schedule and gradient clipping, as Detectron2 defines them."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from fvcore.common import param_scheduler as schedules
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from dyhead.config import ConfigError

_log = logging.getLogger(__name__)

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


def learning_rate_factor(cfg: CfgNode) -> Callable[[int], float]:
    """What the learning rates are multiplied by in iteration 0, 1, ... ``MAX_ITER`` - 1.

    The schedule of ``LR_SCHEDULER_NAME``, with a warm-up over the first ``WARMUP_ITERS`` iterations from
    ``WARMUP_FACTOR`` of its start to the value that it has where the warm-up ends.

    Raises:
        ConfigError: a schedule that is none, such as steps that do not increase.
    """
    solver = cfg.SOLVER
    try:
        schedule = _warmed_up(cfg, _schedule(cfg))
    except ValueError as error:
        raise ConfigError(f"SOLVER.{solver.LR_SCHEDULER_NAME} cannot be built as configured: {error}") from error
    return lambda iteration: schedule(iteration / solver.MAX_ITER)


def _schedule(cfg: CfgNode) -> schedules.ParamScheduler:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return schedules.CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    if solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        return schedules.StepWithFixedGammaParamScheduler(
            base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=solver.MAX_ITER
        )
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) < len(solver.STEPS):
        _log.warning("SOLVER.STEPS %s: those from SOLVER.MAX_ITER %d on have no effect", solver.STEPS, solver.MAX_ITER)
    if not steps:
        return schedules.LinearParamScheduler(1, 1)
    values = [solver.GAMMA**k for k in range(len(steps) + 1)]
    return schedules.MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)


def _warmed_up(cfg: CfgNode, schedule: schedules.ParamScheduler) -> schedules.ParamScheduler:
    solver = cfg.SOLVER
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if length <= 0:
        return schedule
    start, end = solver.WARMUP_FACTOR * schedule(0), schedule(0 if solver.RESCALE_INTERVAL else length)
    if solver.WARMUP_METHOD == "constant":
        end = start
    return schedules.CompositeParamScheduler(
        [schedules.LinearParamScheduler(start, end), schedule],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )


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
