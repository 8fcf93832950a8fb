"""Parameter groups and clipping, against Detectron2's and by hand; resumed states, against an optimizer for each."""

import copy
import logging

import pytest
import torch
from torch import nn

import dyhead.runs.optimizer as module
from dyhead.config import ConfigError
from dyhead.runs.optimizer import build_optimizer, clip_gradients, resumed_state
from dyhead.torchvision import get_cfg


def solver(**settings):
    cfg = get_cfg()
    for key, value in settings.items():
        cfg.SOLVER[key] = value
    return cfg


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))


def hyperparameters(optimizer):
    return {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }


def test_what_decays_and_how_fast_biases_learn():
    model = network()
    model[2].requires_grad_(False)
    options = {"BASE_LR": 0.5, "WEIGHT_DECAY": 0.25, "WEIGHT_DECAY_NORM": 0.125, "MOMENTUM": 0.75, "NESTEROV": True}
    optimizer = build_optimizer(solver(**options), model)
    assert hyperparameters(optimizer) == {
        "0.weight": (0.5, 0.25), "0.bias": (0.5, 0.25), "1.weight": (0.5, 0.125), "1.bias": (0.5, 0.125),
        "3.weight": (0.5, 0.125), "3.bias": (0.5, 0.125),
    }  # fmt: skip
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.75
    assert optimizer.defaults["nesterov"] is True
    found = hyperparameters(build_optimizer(solver(BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.0, **options), model))
    assert found["0.weight"] == (0.5, 0.25)
    assert found["0.bias"] == found["1.bias"] == (1.0, 0.0)
    assert isinstance(build_optimizer(solver(OPTIMIZER="ADAMW"), model), torch.optim.AdamW)


def test_names_are_those_of_the_parameters():
    model = network()
    optimizer = build_optimizer(solver(WEIGHT_DECAY_NORM=0.5), model)
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert named[name] is parameter


def test_a_model_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer(solver(), network().requires_grad_(False))


def test_unknown_optimizers_and_clippings_are_named():
    with pytest.raises(ConfigError, match=r"SOLVER.OPTIMIZER: expected 'SGD' or 'ADAMW', got 'LION'"):
        build_optimizer(solver(OPTIMIZER="LION"), network())
    cfg = solver()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "half"
    with pytest.raises(ConfigError, match=r"CLIP_TYPE: expected one of .*full_model, got 'half'"):
        build_optimizer(cfg, network())


@pytest.mark.detectron2
@pytest.mark.parametrize("bias", [{}, {"BIAS_LR_FACTOR": 2.0}, {"WEIGHT_DECAY_BIAS": 0.125}])
def test_groups_are_those_of_detectron2(bias):
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.solver import build_optimizer as theirs

    model = network()
    model[0].extra = model[2].weight  # shared, and counted once
    cfg = detectron2_cfg()
    for key, value in {"BASE_LR": 0.5, "WEIGHT_DECAY_NORM": 0.25, **bias}.items():
        cfg.SOLVER[key] = value
    expected = theirs(cfg, model)
    found = build_optimizer(solver(BASE_LR=0.5, WEIGHT_DECAY_NORM=0.25, **bias), model)
    by_parameter = [
        {id(p): (g["lr"], g["weight_decay"], g["momentum"]) for g in o.param_groups for p in g["params"]}
        for o in (found, expected)
    ]
    assert by_parameter[0] == by_parameter[1]


@pytest.mark.parametrize(
    ("enabled", "kind", "expected"),
    [
        (False, "value", [[3.0, -4.0], [0.3]]),
        (True, "value", [[1.0, -1.0], [0.3]]),
        (True, "norm", [[0.6, -0.8], [0.3]]),
        (True, "full_model", [[3 / 25.09**0.5, -4 / 25.09**0.5], [0.3 / 25.09**0.5]]),
    ],
)
def test_a_step_clips_first(enabled, kind, expected):
    cfg = solver(BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = enabled
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer(cfg, model)
    model.a.grad, model.b.grad = torch.tensor([3.0, -4.0]), torch.tensor([0.3])
    if enabled:
        copies = [model.a.detach().clone(), model.b.detach().clone()]
        for copy, parameter in zip(copies, (model.a, model.b), strict=True):
            copy.grad = parameter.grad.clone()
        clip_gradients(cfg, copies)
        assert copies[0].grad.tolist() == pytest.approx(expected[0], rel=1e-4)
    optimizer.step()  # at a rate of 1 the step is the gradient
    assert (-model.a).tolist() == pytest.approx(expected[0], rel=1e-4)
    assert (-model.b).tolist() == pytest.approx(expected[1], rel=1e-4)


def test_gradients_are_clipped_in_a_fixed_order(monkeypatch):
    """The sum of their squares is rounded by it: a set's order would make runs of one seed differ."""
    orders = []
    monkeypatch.setattr(module, "clip_gradients", lambda cfg, parameters: orders.append(list(parameters)))
    cfg = solver()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(20))
    build_optimizer(cfg, model).step()
    assert [id(p) for p in orders[0]] == [id(p) for p in model.parameters()]


# Norms decay apart from the rest and then together with it, which merges groups; the first layer freezes or thaws.
@pytest.mark.parametrize("optimizer", ["SGD", "ADAMW"])
@pytest.mark.parametrize(("frozen", "later_frozen"), [((), ()), ((), (0,)), ((0,), ())])
def test_a_resumed_run_goes_on_parameter_by_parameter_with_its_own_settings(optimizer, frozen, later_frozen, caplog):
    caplog.set_level(logging.INFO)
    before = {"OPTIMIZER": optimizer, "BASE_LR": 0.1, "WEIGHT_DECAY": 0.01, "WEIGHT_DECAY_NORM": 0.5, "MOMENTUM": 0.9}
    after = before | {"BASE_LR": 0.05, "WEIGHT_DECAY": 0.02, "WEIGHT_DECAY_NORM": 0.02, "MOMENTUM": 0.5}
    model, first = trained(before, frozen, network())
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    freeze(resumed, later_frozen)
    again = build_optimizer(solver(**after), resumed)
    again.load_state_dict(copy.deepcopy(resumed_state(again, first.state_dict())))
    for group in again.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.05, 0.02)
    step(resumed, again)

    # The same step of each parameter by an optimizer of its own, from its state by hand.
    names = {id(p): n for n, p in model.named_parameters()}
    states = {names[id(p)]: state for p, state in first.state.items()}
    for name, parameter in model.named_parameters():
        if not dict(resumed.named_parameters())[name].requires_grad:
            continue
        alone = nn.Parameter(parameter.detach().clone())
        settings = {"lr": 0.05, "weight_decay": 0.02} | ({"momentum": 0.5} if optimizer == "SGD" else {})
        own = {"SGD": torch.optim.SGD, "ADAMW": torch.optim.AdamW}[optimizer]([alone], **settings)
        if name in states:
            own.state[alone] = {k: v.clone() if torch.is_tensor(v) else v for k, v in states[name].items()}
        alone.grad = gradient(name, alone)
        own.step()
        torch.testing.assert_close(dict(resumed.named_parameters())[name], alone)
    assert ("2 parameters are no longer trained (0.bias" in caplog.text) == bool(later_frozen)
    assert ("2 parameters are trained from now on (0.weight" in caplog.text) == bool(frozen)


def test_another_optimizer_is_refused_by_name():
    _, first = trained({"OPTIMIZER": "ADAMW"}, (), network())
    with pytest.raises(ConfigError, match=r"SOLVER\.OPTIMIZER: expected 'ADAMW', with which it was trained, got 'SGD'"):
        resumed_state(build_optimizer(solver(), network()), first.state_dict())


def test_a_state_without_names_is_taken_by_place_or_refused():
    _, first = trained({"WEIGHT_DECAY_NORM": 0.5}, (), network())
    saved = first.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    model = network()
    same = build_optimizer(solver(WEIGHT_DECAY_NORM=0.25), model)
    state = resumed_state(same, saved)
    assert all(
        torch.equal(state["state"][i]["momentum_buffer"], saved["state"][i]["momentum_buffer"]) for i in range(7)
    )
    with pytest.raises(ConfigError, match=r"of an earlier version.*7 parameters.*trains 5.*FREEZE_AT"):
        resumed_state(build_optimizer(solver(WEIGHT_DECAY_NORM=0.25), freeze(model, (0,))), saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state["state"].update({0: {"exp_avg": torch.ones(3, 2)}}),
            r"state of 0\.weight: expected exp_avg",
        ),
        (lambda state: state["param_groups"][0]["params"].pop(), "a name for each parameter"),
        (lambda state: state.update(state=[]), "expected dict in optimizer.state"),
    ],
)
def test_a_damaged_state_is_named(spoil, message):
    _, first = trained({"OPTIMIZER": "ADAMW"}, (), network())
    state = copy.deepcopy(first.state_dict())
    spoil(state)
    with pytest.raises(ConfigError, match=rf"--resume: run/w\.pth.*{message}"):
        resumed_state(build_optimizer(solver(OPTIMIZER="ADAMW"), network()), state, "run/w.pth")


def trained(settings, frozen, model):
    freeze(model, frozen)
    optimizer = build_optimizer(solver(**settings), model)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def freeze(model, layers):
    for layer in layers:
        model[layer].requires_grad_(False)
    return model


def step(model, optimizer):
    for name, parameter in model.named_parameters():
        parameter.grad = gradient(name, parameter) if parameter.requires_grad else None
    optimizer.step()


def gradient(name, parameter):
    return torch.full_like(parameter, 1 + len(name) + sum(map(ord, name)) / 100)
