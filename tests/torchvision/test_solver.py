"""Optimizer, schedule and clipping, against Detectron2's definitions in closed form."""

import math

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError
from dyhead.schedule import learning_rate_factor
from dyhead.torchvision.solver import build_optimizer, clip_gradients

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


def test_what_decays_and_how_fast_biases_learn(tiny, configured):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    model[2].requires_grad_(False)
    options = {
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.BASE_LR": 0.5,
        "SOLVER.WEIGHT_DECAY": 0.25,
        "SOLVER.WEIGHT_DECAY_NORM": 0.125,
        "SOLVER.MOMENTUM": 0.75,
        "SOLVER.NESTEROV": True,
    }

    def hyperparameters(extra):
        optimizer = build_optimizer(configured(tiny | options | extra), model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {
            names[id(p)]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        return optimizer, found

    optimizer, found = hyperparameters({})
    assert found == {
        "0.weight": (0.5, 0.25), "0.bias": (0.5, 0.25), "1.weight": (0.5, 0.125), "1.bias": (0.5, 0.125),
        "3.weight": (0.5, 0.125), "3.bias": (0.5, 0.125),
    }  # fmt: skip
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.75
    assert optimizer.defaults["nesterov"] is True
    _, found = hyperparameters({"SOLVER.BIAS_LR_FACTOR": 2.0, "SOLVER.WEIGHT_DECAY_BIAS": 0.0})
    assert found["0.weight"] == (0.5, 0.25)
    assert found["0.bias"] == found["1.bias"] == (1.0, 0.0)
    optimizer, _ = hyperparameters({"SOLVER.OPTIMIZER": "ADAMW"})
    assert isinstance(optimizer, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("enabled", "kind", "expected"),
    [
        (False, "value", [[3.0, -4.0], [0.3]]),
        (True, "value", [[1.0, -1.0], [0.3]]),
        (True, "norm", [[0.6, -0.8], [0.3]]),
        (True, "full_model", [[3 / 25.09**0.5, -4 / 25.09**0.5], [0.3 / 25.09**0.5]]),
    ],
)
def test_kinds_of_clipping(tiny, configured, enabled, kind, expected):
    cfg = configured(
        tiny
        | {
            "SOLVER.CLIP_GRADIENTS.ENABLED": enabled,
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": kind,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
        }
    )
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, -4.0]), torch.tensor([0.3])
    clip_gradients(cfg, [a, b])
    assert a.grad.tolist() == pytest.approx(expected[0], rel=1e-4)
    assert b.grad.tolist() == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize(("steps", "warned"), [((30000,), False), ((100,), True), ((60, 100), True), ((60,), False)])
def test_steps_after_the_end_are_named_unless_they_are_the_default(tiny, configured, caplog, steps, warned):
    learning_rate_factor(configured(tiny | SCHEDULE | {"SOLVER.STEPS": steps}))
    assert ("from SOLVER.MAX_ITER 100 on have no effect" in caplog.text) == warned


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
@pytest.mark.parametrize(("max_iter", "warmup"), [(1, 0), (1, 1), (2, 1000), (4, 4), (4, 1)])
@pytest.mark.parametrize("rescale", [False, True])
def test_both_engines_run_a_schedule_to_its_end(tiny, configured, name, max_iter, warmup, rescale):
    """Detectron2's own schedules divide by zero, leave their lists or refuse a step at the end in some of these."""
    from dyhead.detectron2.solver import build_lr_scheduler

    settings = {"SOLVER.LR_SCHEDULER_NAME": name, "SOLVER.MAX_ITER": max_iter, "SOLVER.WARMUP_ITERS": warmup}
    steps = {"SOLVER.STEPS": (max_iter,), "SOLVER.NUM_DECAYS": 1, "SOLVER.RESCALE_INTERVAL": rescale}
    cfg = configured(tiny | SCHEDULE | settings | steps)
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
