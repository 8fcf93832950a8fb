"""The schedule, against Detectron2's definitions in closed form."""

import math

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError
from dyhead.torchvision.solver import learning_rate_factor

SCHEDULE = {
    "SOLVER.MAX_ITER": 100,
    "SOLVER.STEPS": (60, 80),
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.WARMUP_FACTOR": 0.001,
}


def factors(cfg):
    factor = learning_rate_factor(cfg)
    return [factor(i) for i in range(cfg.SOLVER.MAX_ITER)]


def test_steps_with_linear_warm_up(tiny, configured):
    expected = [0.001 + 0.999 * i / 10 if i < 10 else 0.1 ** ((i >= 60) + (i >= 80)) for i in range(100)]
    assert factors(configured(tiny | SCHEDULE)) == pytest.approx(expected)


def test_constant_warm_up(tiny, configured):
    found = factors(configured(tiny | SCHEDULE | {"SOLVER.WARMUP_METHOD": "constant"}))
    assert found == pytest.approx([0.001] * 10 + [1] * 50 + [0.1] * 20 + [0.01] * 20)


def test_cosine_with_linear_warm_up_to_the_cosine(tiny, configured):
    options = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR": 0.01, "SOLVER.BASE_LR_END": 0.001}

    def cosine(i):
        return 0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2

    expected = [0.001 + (cosine(10) - 0.001) * i / 10 if i < 10 else cosine(i) for i in range(100)]
    assert factors(configured(tiny | SCHEDULE | options)) == pytest.approx(expected)


def test_a_warm_up_longer_than_the_training_and_none(tiny, configured):
    long = configured(tiny | SCHEDULE | {"SOLVER.WARMUP_ITERS": 1000, "SOLVER.STEPS": ()})
    assert factors(long) == pytest.approx([0.001 + 0.999 * i / 100 for i in range(100)])
    assert factors(configured(tiny | SCHEDULE | {"SOLVER.WARMUP_ITERS": 0, "SOLVER.STEPS": (200,)})) == [1.0] * 100


def test_steps_that_do_not_increase_are_refused(tiny, configured):
    with pytest.raises(ConfigError, match=r"SOLVER\.WarmupMultiStepLR"):
        learning_rate_factor(configured(tiny | SCHEDULE | {"SOLVER.STEPS": (80, 60)}))


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules_are_those_of_detectron2(tiny, configured, name, rescale):
    from detectron2.solver import build_lr_scheduler

    cfg = configured(tiny | SCHEDULE | {"SOLVER.LR_SCHEDULER_NAME": name, "SOLVER.RESCALE_INTERVAL": rescale})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    theirs = [optimizer.param_groups[0]["lr"]]
    for _ in range(99):
        optimizer.step()
        scheduler.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    assert factors(cfg) == pytest.approx(theirs)
