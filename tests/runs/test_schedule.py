"""The schedule, against Detectron2's definitions in closed form."""

import math

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError, get
from dyhead.runs.schedule import learning_rate_factor
from dyhead.torchvision import get_cfg

SCHEDULE = {
    "SOLVER.MAX_ITER": 100,
    "SOLVER.STEPS": (60, 80),
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.WARMUP_FACTOR": 0.001,
}


def configured(settings):
    cfg = get_cfg()
    for key, value in settings.items():
        node, _, name = key.rpartition(".")
        get(cfg, node)[name] = value
    return cfg


def factors(cfg):
    factor = learning_rate_factor(cfg)
    return [factor(i) for i in range(cfg.SOLVER.MAX_ITER)]


def test_steps_with_linear_warm_up():
    expected = [0.001 + 0.999 * i / 10 if i < 10 else 0.1 ** ((i >= 60) + (i >= 80)) for i in range(100)]
    assert factors(configured(SCHEDULE)) == pytest.approx(expected)


def test_constant_warm_up():
    found = factors(configured(SCHEDULE | {"SOLVER.WARMUP_METHOD": "constant"}))
    assert found == pytest.approx([0.001] * 10 + [1] * 50 + [0.1] * 20 + [0.01] * 20)


def test_cosine_with_linear_warm_up_to_the_cosine():
    options = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR": 0.01, "SOLVER.BASE_LR_END": 0.001}

    def cosine(i):
        return 0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2

    expected = [0.001 + (cosine(10) - 0.001) * i / 10 if i < 10 else cosine(i) for i in range(100)]
    assert factors(configured(SCHEDULE | options)) == pytest.approx(expected)


def test_a_warm_up_longer_than_the_training_and_none():
    long = configured(SCHEDULE | {"SOLVER.WARMUP_ITERS": 1000, "SOLVER.STEPS": ()})
    assert factors(long) == pytest.approx([0.001 + 0.999 * i / 100 for i in range(100)])
    assert factors(configured(SCHEDULE | {"SOLVER.WARMUP_ITERS": 0, "SOLVER.STEPS": (200,)})) == [1.0] * 100


def test_steps_that_do_not_increase_are_refused():
    with pytest.raises(ConfigError, match=r"SOLVER\.WarmupMultiStepLR"):
        learning_rate_factor(configured(SCHEDULE | {"SOLVER.STEPS": (80, 60)}))


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize("rescale", [False, True])
def test_schedules_are_those_of_detectron2(name, rescale):
    from detectron2.solver import build_lr_scheduler

    cfg = configured(SCHEDULE | {"SOLVER.LR_SCHEDULER_NAME": name, "SOLVER.RESCALE_INTERVAL": rescale})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    theirs = [optimizer.param_groups[0]["lr"]]
    for _ in range(99):
        optimizer.step()
        scheduler.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    assert factors(cfg) == pytest.approx(theirs)


@pytest.mark.parametrize(("steps", "warned"), [((30000,), False), ((100,), True), ((60, 100), True), ((60,), False)])
def test_steps_after_the_end_are_named_unless_they_are_the_default(caplog, steps, warned):
    learning_rate_factor(configured(SCHEDULE | {"SOLVER.STEPS": steps}))
    assert ("from SOLVER.MAX_ITER 100 on have no effect" in caplog.text) == warned


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize(("max_iter", "warmup"), [(1, 0), (1, 1), (2, 1000), (4, 4), (4, 1)])
@pytest.mark.parametrize("rescale", [False, True])
def test_both_engines_run_a_schedule_to_its_end(name, max_iter, warmup, rescale):
    """Detectron2's own schedules divide by zero, leave their lists or refuse a step at the end in some of these."""
    from dyhead.detectron2.schedule import build_lr_scheduler

    settings = {"SOLVER.LR_SCHEDULER_NAME": name, "SOLVER.MAX_ITER": max_iter, "SOLVER.WARMUP_ITERS": warmup}
    steps = {"SOLVER.STEPS": (max_iter,), "SOLVER.NUM_DECAYS": 1, "SOLVER.RESCALE_INTERVAL": rescale}
    cfg = configured(SCHEDULE | settings | steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(max_iter):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    factor = learning_rate_factor(cfg)
    assert rates == pytest.approx([2.0 * factor(i) for i in range(max_iter)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])
