from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dyhead.config import ConfigError, check_options, load_config, options_of
from dyhead.necks import NECKS, DyHeadOptions, Stack, register_neck
from dyhead.options import at_least, option
from dyhead.torchvision import get_cfg


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


def test_a_neck_that_is_registered_late_has_its_keys_in_the_configuration(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("VERSION: 2")
    load_config(get_cfg(), file)

    @register_neck("Late")
    @dataclass(frozen=True)
    class Options(DyHeadOptions):
        factor: float = option(2.0, "what for", at_least(1))

    try:
        cfg = get_cfg()
        load_config(cfg, file, ["MODEL.NECKS", "['Late']", "MODEL.LATE.FACTOR", "3", "MODEL.LATE.NUM_BLOCKS", "4"])
        assert (cfg.MODEL.LATE.FACTOR, options_of(cfg, "MODEL.LATE")) == (3.0, Options(factor=3.0, num_blocks=4))
        check_options(cfg, "MODEL")
        cfg.MODEL.NECKS = ["Later"]
        with pytest.raises(ConfigError, match=r"MODEL.NECKS: expected .*one of .*'DyHead'.*'Late'.*, got"):
            check_options(cfg, "MODEL")
    finally:
        del NECKS["Late"]
