import inspect

import pytest
import torch

from dyhead.layers import DyHead
from dyhead.necks import DyHeadOptions
from dyhead.options import leaves

STRIDES = (8, 16, 32)


def test_defaults_are_the_modules():
    parameters = inspect.signature(DyHead).parameters
    assert {leaf.key.lower(): leaf.default for leaf in leaves(DyHeadOptions)} == {
        name: parameter.default for name, parameter in parameters.items() if not name.endswith("channels")
    }


def test_an_empty_norm_is_none():
    assert DyHeadOptions(num_blocks=1, norm="").build(16).blocks[0].spatial_attention.norm is None


def test_passes_on_what_changes_no_result():
    head = DyHeadOptions(num_blocks=1, zero_init_offset=False, use_checkpoint=True).build(16)
    assert head.use_checkpoint
    assert head.blocks[0].spatial_attention.offset.weight.std() > 0.005


def test_builds_what_the_options_say():
    torch.manual_seed(0)
    mine = DyHeadOptions(num_blocks=2, window=None, task_aware=False, offset_groups=2, norm_groups=4).build(8)
    torch.manual_seed(0)
    same = DyHead(8, 2, window=None, task_aware=False, offset_groups=2, norm_groups=4)
    assert repr(mine) == repr(same)
    for (name, got), (other, want) in zip(mine.state_dict().items(), same.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(got, want)
    pyramid = {"p3": torch.randn(1, 8, 8, 6), "p4": torch.randn(1, 8, 4, 3)}
    got, want = mine(pyramid), same(pyramid)
    assert list(got) == ["p3", "p4"]
    assert all(torch.equal(got[name], want[name]) for name in pyramid)


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, 1),
        ({"block": "released"}, 32),
        ({"block": "mmdetection_main"}, 32),
        ({"block": "released", "num_blocks": 0}, 1),
    ],
)
def test_only_the_published_blocks_ask_for_whole_cells_of_the_last_level(options, divisor):
    assert DyHeadOptions(**options).size_divisibility(STRIDES) == divisor


def test_options_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(ValueError, match="norm_groups"):
        DyHeadOptions(num_blocks=1, norm_groups=3).build(8)
    with pytest.raises(ValueError, match="block='released': expected no options, .* got window=2"):
        DyHeadOptions(num_blocks=1, block="released", window=2).build(8)


@pytest.mark.parametrize(
    ("key", "legal", "illegal"),
    [
        ("NUM_BLOCKS", [0, 6], [-1]),
        ("BLOCK", ["paper", "released", "mmdetection", "mmdetection_main"], ["none"]),
        ("WINDOW", [None, 1, 3], [0, -1]),
        ("OFFSET_GROUPS", [1], [0]),
        ("NORM", ["GN", "BN", "SyncBN", ""], ["LN", None]),
        ("NORM_GROUPS", [16], [0]),
    ],
)
def test_legal_values(key, legal, illegal):
    (leaf,) = (leaf for leaf in leaves(DyHeadOptions) if leaf.key == key)
    assert [value for value in (*legal, *illegal) if leaf.expected(value) is None] == legal
