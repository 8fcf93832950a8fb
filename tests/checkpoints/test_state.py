"""Weights of wrapped models, and what stands beside them."""

import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dyhead.checkpoints import CheckpointError, find_state, read_state


def network(value=1.0):
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), norm=nn.BatchNorm1d(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


class Module(nn.Module):
    """As a LightningModule has a model, and maybe its moving average, as attributes."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def compiled_part():
    model = network()
    model.body = torch.compile(model.body)
    return model


PLAIN = network().state_dict()


def assert_plain(state):
    assert state.keys() == PLAIN.keys()
    assert all(torch.equal(state[key], value) for key, value in PLAIN.items())


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        AveragedModel,
        lambda model: Module(model=model),
        lambda model: Module(ema_model=model),
        lambda model: Module(model=nn.DataParallel(torch.compile(model))),
        lambda model: torch.compile(nn.DataParallel(Module(ema=AveragedModel(model)))),
        lambda model: nn.DataParallel(Module(module=Module(model=model))),
        lambda model: compiled_part(),
    ],
)
def test_what_wrappers_add_to_the_keys_is_taken_off(wrap):
    state = wrap(network()).state_dict()
    assert state.keys() != PLAIN.keys()
    assert_plain(find_state({"state_dict": state}, "x"))
    assert_plain(find_state(state, "x"))


def test_a_prefix_that_not_all_weights_have_stays():
    state = {"model.a": torch.ones(1), "module.b": torch.ones(1), "c": torch.ones(1)}
    assert find_state(state, "x").keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Module(model=network(), ema_model=AveragedModel(network(2))).state_dict(), "ema_model"),
        (Module(ema=network(2), model=torch.compile(network())).state_dict(), "ema"),
        (Module(module=Module(online_model=network(), ema_model=network(2))).state_dict(), "ema_model"),
        (network().state_dict() | {f"model_ema.{key}": value + 1 for key, value in PLAIN.items()}, "model_ema"),
        (network().state_dict() | {"ema_body_weight": torch.zeros(3, 2)}, r"ema_\*"),  # mmcv
        ({"state_dict": PLAIN, "ema_state_dict": network(2).state_dict(), "epoch": 1}, "ema_state_dict"),
        ({"ema": {"module": network(2).state_dict()}, "model": nn.DataParallel(network()).state_dict()}, "ema.module"),
        ({"model_ema": network(2).state_dict(), "module": {"state_dict": PLAIN}}, "model_ema"),
        ({"model": {"ema": network(2).state_dict()}, "state_dict": PLAIN}, "model.ema"),
    ],
)
def test_of_a_model_and_its_moving_average_the_model_is_taken_and_the_log_says_so(content, named, caplog):
    caplog.set_level(logging.INFO)
    assert_plain(find_state(content, "x"))
    (message,) = (record.getMessage() for record in caplog.records if "took" in record.getMessage())
    assert message.startswith("x: took the weights ")
    assert message.rstrip(")").endswith(named.replace("\\", ""))


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict_ema": PLAIN, "epoch": 3},
        {"model_ema": {f"module.{key}": value for key, value in PLAIN.items()}},
        {"ema": {"model": PLAIN, "decay": 0.99}},
        {f"ema.{key}": value for key, value in PLAIN.items()},
    ],
)
def test_a_moving_average_alone_is_taken_and_named(content, caplog):
    caplog.set_level(logging.INFO)
    assert_plain(find_state(content, "x"))
    assert "x: the weights are those of a moving average (" in caplog.text


def test_entries_beside_the_weights_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    beside = {"epoch": 3, "best": np.float64(0.5), "lr": [0.1], "cfg": {"model": "x"}, "names": np.array(["a"])}
    torch.save({**PLAIN, **beside}, tmp_path / "w.pth")
    assert_plain(read_state(tmp_path / "w.pth"))
    assert "w.pth: not weights: epoch, best, lr, cfg, names" in caplog.text


def test_entries_of_weights_that_are_none_are_passed_over():
    assert_plain(find_state({"model": {"name": "resnet"}, "state_dict": PLAIN}, "x"))


def test_keys_that_become_the_same_are_an_error():
    state = {"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"^x: expected one tensor for a\.b, got a\._orig_mod\.b and a\.b$"):
        find_state(state, "x")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(3).to_sparse(), "a sparse one"),
        (torch.ones(3, 3).to_sparse(1), "a sparse one"),
        (torch.ones(2, device="meta"), "one without data"),
        (torch.ones(2) * 1j, "torch.complex64"),
        (torch.ones(2).to(torch.float8_e5m2), "torch.float8_e5m2"),
        (torch.ones(2, dtype=torch.uint16), "torch.uint16"),
        (torch.ones(1).expand(10**6, 10**6), r"one of shape \(1000000, 1000000\), more than the file holds"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_key(value, kind):
    with pytest.raises(CheckpointError, match=f"^x: expected a dense tensor of numbers, got {kind} in a$"):
        find_state({"model": {"module.a": value}}, "x")


@pytest.mark.parametrize(
    ("key", "shown"),
    [(3, "3"), (None, "None"), (("a", 1), r"\('a', 1\)"), ("\ud800", r"'\\ud800'"), ("a\nb", r"'a\\nb'")],
)
def test_keys_that_are_no_text_are_refused(key, shown):
    with pytest.raises(CheckpointError, match=f"^x: expected text as the key of a tensor, got {shown}$"):
        find_state({"a": torch.ones(1), key: torch.ones(1)}, "x")


def test_dicts_that_contain_each_other_end():
    outer, inner = {}, {"x": 3}
    outer["model"], inner["module"] = inner, outer
    with pytest.raises(CheckpointError, match="got no tensor under"):
        find_state(outer, "x")
    inner["state_dict"] = {**PLAIN, "ema": outer}
    assert_plain(find_state(outer, "x"))


def test_nesting_without_end_is_an_error():
    content = {"a": torch.ones(1)}
    for _ in range(100_000):
        content = {"model": content}
    with pytest.raises(CheckpointError, match="in each other without end"):
        find_state(content, "x")
    assert find_state({"module.model." * 5000 + "a": torch.ones(1)}, "x").keys() == {"a"}


def test_counters_of_wrappers_alone_are_no_weights():
    with pytest.raises(CheckpointError, match="x: expected weights, got only n_averaged"):
        find_state({"n_averaged": torch.tensor(3)}, "x")


@pytest.mark.parametrize("order", ["<", ">"])
def test_arrays_of_any_byte_order_become_tensors(order):
    array = np.arange(6, dtype=f"{order}f4").reshape(3, 2)[:, ::-1]
    found = find_state({"a": array, "b": np.array(2, dtype=f"{order}i8")}, "x")
    assert found["a"].tolist() == array.tolist()
    assert found["b"].item() == 2
