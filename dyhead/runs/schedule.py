"""The learning rate schedules of Detectron2, for both engines."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fvcore.common import param_scheduler as schedules
from fvcore.common.config import CfgNode

from dyhead.config import ConfigError
from dyhead.config_checks import DEFAULT_STEPS

_log = logging.getLogger(__name__)

_END = 1 - 1e-5  # of the training, as far as fvcore's steps of equal length go: they have no value where it has ended


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


def _schedule(cfg: CfgNode) -> Callable[[float], float]:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return schedules.CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    if solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        steps_of_equal_length = schedules.StepWithFixedGammaParamScheduler(
            base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=solver.MAX_ITER
        )
        return lambda where: steps_of_equal_length(min(where, _END))
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) < len(solver.STEPS) and tuple(solver.STEPS) != DEFAULT_STEPS:
        _log.warning("SOLVER.STEPS %s: those from SOLVER.MAX_ITER %d on have no effect", solver.STEPS, solver.MAX_ITER)
    if not steps:
        return schedules.LinearParamScheduler(1, 1)
    values = [solver.GAMMA**k for k in range(len(steps) + 1)]
    return schedules.MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)


def _warmed_up(cfg: CfgNode, schedule: Callable[[float], float]) -> Callable[[float], float]:
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
