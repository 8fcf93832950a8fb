import pytest
import torch
from torch import nn

from dyhead.necks import NECKS, DyHeadOptions, Stack, register_neck


class Add(nn.Module):
    """Adds a parameter to every level."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, pyramid):
        return {name: level + self.value for name, level in pyramid.items()}


class Twice(nn.Module):
    def forward(self, pyramid):
        return {name: 2 * level for name, level in pyramid.items()}


def test_necks_follow_each_other_in_their_order():
    pyramid = {"p3": torch.ones(1, 1, 2, 2), "p4": torch.zeros(1, 1, 1, 1)}
    for necks, want in (
        ({"add": Add(3.0), "twice": Twice()}, (8.0, 6.0)),
        ({"twice": Twice(), "add": Add(3.0)}, (5.0, 3.0)),
        ({}, (1.0, 0.0)),
    ):
        got = Stack(necks)(pyramid)
        assert list(got) == ["p3", "p4"]
        assert (got["p3"].unique().item(), got["p4"].unique().item()) == want


def test_parameters_are_named_after_their_neck():
    assert list(Stack({"add": Add(1.0), "twice": Twice()}).state_dict()) == ["add.value"]


@pytest.mark.parametrize(("divisors", "common"), [((), 1), ((32,), 32), ((32, 1), 32), ((4, 6), 12)])
def test_images_are_divisible_by_what_every_neck_asks_for(divisors, common):
    assert Stack({}, divisors).size_divisibility == common


def test_a_neck_of_ones_own(monkeypatch):
    monkeypatch.setattr("dyhead.necks.registry.NECKS", registered := {})

    @register_neck("Mine")
    class Options:
        pass

    assert (registered["Mine"].name, registered["Mine"].node, registered["Mine"].options) == (
        "Mine",
        "MODEL.MINE",
        Options,
    )
    with pytest.raises(ValueError, match="neck 'Mine': registered before, by"):
        register_neck("Mine")(Options)


def test_dyhead_is_registered():
    assert NECKS["DyHead"].node == "MODEL.DYHEAD"
    assert NECKS["DyHead"].options is DyHeadOptions
