import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dyhead.layers import SEPC, PConv, SampledPConv, TaskLevel
from dyhead.layers.pconv import normalize
from tools.originals import sepc as originals
from tools.originals.rows import table

RECORD = Path(__file__).parent / "sepc" / "sepc.json"


def test_computes_what_the_authors_code_does():
    with np.load(RECORD.with_suffix(".npz")) as arrays:
        rows = list(originals.compare(json.loads(RECORD.read_text()), dict(arrays)))
    assert len(rows) == 32
    assert all(row.passes for row in rows), table(rows)


def by_hand(neck, levels, padding):
    """The tasks' features from those of the blocks, from torch's convolution and torchvision's deformable one."""
    deform_conv2d = pytest.importorskip("torchvision").ops.deform_conv2d
    for block in neck.blocks:
        levels = block(levels)
    results = []
    for conv, norm in ((neck.class_conv, neck.class_norm), (neck.box_conv, neck.box_norm)):
        out = []
        for i, level in enumerate(levels):
            x = level
            if conv.offset is None or i == 0:
                out.append(functional.conv2d(x, conv.weight, conv.bias, padding=padding))
            else:
                offset = functional.conv2d(x, conv.offset.weight, conv.offset.bias, padding=padding)
                out.append(deform_conv2d(x, offset, conv.weight, conv.bias, padding=padding))
        results.append([x.relu() for x in normalize(norm, out)])
    return results


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("task_convs", ["plain", "deformable"])
@pytest.mark.parametrize("conv", ["plain", "deformable", "sampled"])
def test_each_task_has_a_convolution_of_its_own(make_pyramid, randomize, conv, task_convs, norm, padding):
    neck = SEPC(4, 2, conv=conv, task_convs=task_convs, norm=norm, task_padding=padding).double().eval()
    randomize(neck)
    levels = make_pyramid(11, 13, levels=3, channels=4)
    out = neck(levels)
    classes, boxes = by_hand(neck, levels, padding)
    for level, want_classes, want_boxes in zip(out, classes, boxes, strict=True):
        assert isinstance(level, TaskLevel)
        torch.testing.assert_close(level.classes, want_classes)
        torch.testing.assert_close(level.boxes, want_boxes)
        assert not torch.allclose(level.classes, level.boxes)


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("conv", ["plain", "deformable", "sampled"])
def test_without_these_it_is_a_stack_of_blocks(make_pyramid, randomize, conv, norm):
    neck = randomize(SEPC(4, 3, conv=conv, task_convs="none", norm=norm).double())
    levels = make_pyramid(9, 7, levels=4, channels=4)
    want = levels
    kind = SampledPConv if conv == "sampled" else PConv
    assert len(neck.blocks) == 3
    for block in neck.blocks:
        assert type(block) is kind
        want = block(want)
    for ours, theirs in zip(neck(levels), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_no_blocks_leave_the_pyramid_as_it_is(make_pyramid):
    levels = make_pyramid(9, 7)
    got = SEPC(8, 0, task_convs="none")(levels)
    assert all(torch.equal(a, b) for a, b in zip(got, levels, strict=True))


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_returns_the_kind_of_pyramid_that_it_gets(make_pyramid, kind):
    levels = make_pyramid(8, 6, dtype=torch.float32)
    pyramid = {f"p{i}": level for i, level in enumerate(levels)} if kind is dict else kind(levels)
    for task_convs in ("plain", "none"):
        out = SEPC(8, 1, task_convs=task_convs)(pyramid)
        assert type(out) is kind
        assert not isinstance(out, dict) or list(out) == list(pyramid)


@pytest.mark.parametrize("task_convs", ["plain", "deformable"])
def test_without_padding_levels_lose_two_rows_but_not_their_last(make_pyramid, randomize, task_convs):
    neck = randomize(SEPC(4, 1, task_convs=task_convs, norm="", task_padding=0).double())
    levels = make_pyramid(9, 5, levels=4, channels=4)  # 9 x 5, 5 x 3, 3 x 2, 2 x 1
    assert [tuple(level.boxes.shape[2:]) for level in neck(levels)] == [(7, 3), (3, 1), (1, 1), (1, 1)]
    # The level of 2 x 1 pixels stands in the corner of one of 3 x 3, whose rest is 0.
    (block,) = neck.blocks
    corner = functional.pad(block(levels)[3], [0, 2, 0, 1])
    assert corner.shape[2:] == (3, 3)
    torch.testing.assert_close(neck(levels)[3].classes, neck.class_conv(corner, 3).relu())


@pytest.mark.parametrize("options", [{}, {"conv": "sampled"}, {"task_convs": "none"}])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(make_pyramid, randomize, options, training):
    neck = randomize(SEPC(2, 1, **options).double()).train(training)
    levels = [level.requires_grad_() for level in make_pyramid(5, 3, levels=3, channels=2)]

    def outputs(*inputs):
        out = neck(list(inputs[:3]))
        return tuple(x for level in out for x in (level if isinstance(level, tuple) else (level,)))

    assert torch.autograd.gradcheck(outputs, (*levels, *neck.parameters()), fast_mode=True)


@pytest.mark.parametrize("conv", ["plain", "deformable", "sampled"])
def test_every_parameter_has_a_gradient(make_pyramid, randomize, conv):
    neck = randomize(SEPC(4, 2, conv=conv))
    out = neck(make_pyramid(17, 9, levels=4, channels=4, dtype=torch.float32))
    sum(x.square().sum() for level in out for x in level).backward()
    assert [key for key, p in neck.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("conv", ["plain", "deformable", "sampled"])
@pytest.mark.parametrize("size", [(9, 13), (1, 1), (4, 1)])
def test_bfloat16_gives_nearly_the_same(make_pyramid, randomize, conv, size):
    neck = randomize(SEPC(8, 1, conv=conv, norm=""), std=0.1)
    levels = make_pyramid(*size, dtype=torch.float32)
    exact = neck(levels)
    with torch.autocast("cpu", torch.bfloat16):
        half = neck(levels)
    for ours, theirs in zip(half, exact, strict=True):
        for mine, want in zip(ours, theirs, strict=True):
            assert mine.dtype == torch.bfloat16
            assert (mine.float() - want).abs().max() < 0.05 * max(want.abs().max().item(), 1)


def test_keys_of_the_state():
    """Checkpoints hold them."""
    assert list(SEPC(4, 1).state_dict()) == [
        *(f"blocks.0.{of}.{key}" for of in ("finer", "same", "coarser") for key in KEYS_OF_CONVOLUTION),
        *(f"blocks.0.norm.{key}" for key in KEYS_OF_NORM),
        *(f"{of}_conv.{key}" for of in ("class", "box") for key in KEYS_OF_CONVOLUTION),
        *(f"{of}_norm.{key}" for of in ("class", "box") for key in KEYS_OF_NORM),
    ]
    assert list(SEPC(4, 1, conv="sampled", task_convs="none", norm="").state_dict()) == [
        f"blocks.0.{key}" for key in ("weight", "bias", "offset.weight", "offset.bias")
    ]


KEYS_OF_CONVOLUTION = ("weight", "bias", "offset.weight", "offset.bias")
KEYS_OF_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": -1}, "num_blocks: expected an integer from 0 to 2147483647, got -1"),
        ({"conv": "dcn"}, "conv: expected one of 'plain', 'deformable', 'sampled', got 'dcn'"),
        ({"task_convs": "all"}, "task_convs: expected one of 'none', 'plain', 'deformable', got 'all'"),
        ({"norm": "GN"}, "norm: expected one of '', 'BN', 'SyncBN', got 'GN'"),
        ({"task_padding": 2}, "task_padding: expected 0 or 1, got 2"),
        (
            {"task_padding": 0, "task_convs": "none"},
            "task_padding: expected 1 with task_convs 'none', which pads nothing, got 0",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        SEPC(4, **options)


def test_a_level_that_is_not_half_of_the_finer_one_is_refused(make_pyramid):
    levels = [*make_pyramid(9, 12, levels=1), *make_pyramid(4, 6, levels=1)]
    with pytest.raises(ValueError, match=r"level 1: expected half the size of level 0 \(9 x 12\), rounded up"):
        SEPC(8).double()(levels)
    SEPC(8, conv="sampled").double()(levels)
