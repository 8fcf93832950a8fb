"""What is checked before a training goes on from a checkpoint, in both engines."""

import copy
import math

import pytest
import torch
from torch import nn

from dyhead.checkpoints import CheckpointError
from dyhead.checkpoints.resuming import check_optimizer_state, check_written_by, entry, iteration


@pytest.mark.parametrize(
    ("content", "engine", "message"),
    [
        (
            {"trainer": {}},
            "torchvision",
            "run/w.pth was written by the detectron2 engine; continue it with --engine de",
        ),
        ({"dyhead": {}}, "detectron2", "run/w.pth was written by the torchvision engine; continue it with --engine to"),
        ({"global_step": 3}, "torchvision", "an earlier version"),
        ({"model": {}}, "detectron2", "run/w.pth is no checkpoint of a training on detectron2"),
        ({"a": torch.ones(1)}, "torchvision", "run/w.pth is no checkpoint of a training on torchvision"),
    ],
)
def test_files_that_an_engine_cannot_continue_say_what_to_do(content, engine, message):
    with pytest.raises(CheckpointError) as error:
        check_written_by(content, engine, "run/w.pth")
    assert message in str(error.value)
    assert "start from its weights, with MODEL.WEIGHTS run/w.pth and another OUTPUT_DIR" in str(error.value)


def test_an_engine_continues_its_own_files():
    check_written_by({"trainer": {}}, "detectron2", "w")
    check_written_by({"dyhead": {}}, "torchvision", "w")


@pytest.mark.parametrize("value", [None, "3", 3.0, True, [3], {}, "\ud800", -1])
def test_an_iteration_is_a_number_from_0(value):
    with pytest.raises(CheckpointError, match=r"^--resume: w: expected (int|0 or more) in a\.b, got ") as error:
        iteration({"a": {"b": value}}, "a.b", 10, "w")
    assert str(error.value).isprintable()
    with pytest.raises(CheckpointError, match=r"expected int in a\.b, got None"):
        iteration({"a": 3}, "a.b", 10, "w")


def test_a_run_cannot_have_done_more_than_all():
    assert iteration({"i": 9}, "i", 10, "w") == 9
    with pytest.raises(CheckpointError, match=r"SOLVER\.MAX_ITER: .* w has done, 11, got 10"):
        iteration({"i": 10}, "i", 10, "w")
    with pytest.raises(CheckpointError, match=r"SOLVER\.MAX_ITER"):
        iteration({"i": 10**50}, "i", 10, "w")


def test_entries_are_found_by_type():
    assert entry({"a": {"b": "x"}}, "a.b", str, "w") == "x"
    with pytest.raises(CheckpointError, match=r"w: expected str in a\.c, got None"):
        entry({"a": {"b": "x"}}, "a.c", str, "w")


def trained(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": 0.5}]
    optimizer = kind(groups, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    return optimizer


OPTIMIZERS = [torch.optim.SGD, torch.optim.AdamW]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizers_own_state_fits(kind):
    optimizer = trained(kind)
    check_optimizer_state(optimizer.state_dict(), "w")
    fresh = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    check_optimizer_state(fresh, "w")


def change(path, value):
    def apply(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return apply


SPOILT = {
    "no groups": (change(["param_groups"], None), "expected list in optimizer.param_groups"),
    "empty groups": (change(["param_groups"], []), "expected each parameter once"),
    "no state": (change(["state"], []), "expected dict in optimizer.state"),
    "one group": (change(["param_groups", 1], None), "expected each parameter once, got others under 2, 3"),
    "fewer": (change(["param_groups", 0, "params"], [0]), "expected each parameter once, got others under 1"),
    "a group of no kind": (change(["param_groups", 0], 3), "expected the numbers of each group's parameters, got 3"),
    "parameters of no kind": (change(["param_groups", 0, "params"], [[], {}]), "expected the numbers of each group's"),
    "twice": (change(["param_groups", 0, "params"], [0, 0]), "expected each parameter once"),
    "unknown": (change(["state", 7], {}), "expected each parameter once, got others under 7"),
    "no list of names": (change(["param_groups", 0, "param_names"], "ab"), "a name for each parameter, got 'ab'"),
    "one name": (change(["param_groups", 0, "param_names"], ["a"]), r"a name for each parameter, got \['a'\]"),
    "a name of no kind": (change(["param_groups", 0, "param_names"], ["a", 3]), "a name for each parameter"),
    "no dict": (change(["state", 2], 3), "expected a dict for parameter 2"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fault", SPOILT)
def test_a_state_of_no_optimizer_is_named(kind, fault):
    spoil, message = SPOILT[fault]
    optimizer = trained(kind)
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    with pytest.raises(CheckpointError, match=rf"^--resume: run/w\.pth.*{message}"):
        check_optimizer_state(state, "run/w.pth")


@pytest.mark.parametrize(("kind", "key"), [(torch.optim.SGD, "momentum_buffer"), (torch.optim.AdamW, "exp_avg_sq")])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((2, 3), math.inf), "expected finite numbers"),
        (torch.ones(2, 3) * 1j, "expected finite numbers"),
        (torch.ones(2, 3).to_sparse(), "expected a number or a dense tensor"),
        (torch.ones(2, 3, device="meta"), "expected a number or a dense tensor"),
        ("text", "expected a number or a dense tensor, got str"),
    ],
)
def test_values_that_are_no_finite_numbers_are_named(kind, key, value, message):
    optimizer = trained(kind)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][key] = value
    with pytest.raises(CheckpointError, match=rf"^--resume: w: the optimizer's state: {key} of parameter 0: {message}"):
        check_optimizer_state(state, "w")
