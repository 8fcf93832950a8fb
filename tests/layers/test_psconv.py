"""PSConv against its definition, channel by channel, and against its authors' code."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dyhead.layers import PSConv2d
from dyhead.layers.psconv import gather
from tools.originals import resnets
from tools.originals.rows import table

RECORD = json.loads((Path(__file__).parent / "psconv" / "originals.json").read_text())


def defined(layer, x):
    """One convolution for every pair of blocks, with the dilation that the definition gives it, in a slow loop."""
    groups, parts, d = layer.groups, layer.parts, layer.same.dilation[0]
    outputs = []
    for g, inputs in enumerate(x.chunk(groups, dim=1)):
        blocks = inputs.chunk(parts, dim=1)
        for o in range(parts):
            kernels = {kind: conv.weight.chunk(groups * parts)[g * parts + o] for kind, conv in kinds(layer).items()}
            rest = list(kernels["rest"].chunk(parts - 2, dim=1)) if "rest" in kernels else []
            total = 0
            for c, block in enumerate(blocks):
                kind = {0: "same", parts // 2: "opposite"}.get((o - c) % parts)
                dilation = {"same": d, "opposite": 2 * d}.get(kind, 1)
                kernel = kernels[kind] if kind else rest.pop(0)
                total = total + F.conv2d(block, kernel, None, layer.stride, dilation, dilation)
            outputs.append(total)
    out = torch.cat(outputs, dim=1)
    return out if layer.same.bias is None else out + layer.same.bias[:, None, None]


def kinds(layer):
    return {kind: conv for kind in ("same", "opposite", "rest") if (conv := getattr(layer, kind)) is not None}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((8, 12), {}),
        ((8, 8), {"stride": 2, "dilation": 1}),
        ((16, 8), {"groups": 2, "bias": True}),
        ((12, 6), {"parts": 6, "dilation": 3}),
        ((8, 4), {"parts": 2, "groups": 2}),
    ],
)
def test_dilation_depends_on_the_blocks_that_are_read_and_written(arguments, options):
    torch.manual_seed(0)
    layer = PSConv2d(*arguments, **options).double()
    x = torch.randn(2, arguments[0], 9, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), defined(layer, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_it_has_the_weights_of_a_plain_convolution_and_starts_like_one(groups):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    layer = PSConv2d(64, 64, groups=groups)
    assert sum(p.numel() for p in layer.parameters()) == plain.weight.numel()
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.std(), plain.weight.std(), rtol=0.05, atol=0)


def test_outputs_gradients_and_held_weights_are_those_of_its_authors():
    arrays = {name: np.asarray(values).reshape(1, -1) for name, values in RECORD["values"].items()}
    arrays = {name: x.reshape(1, -1, 3, 3) if "gradient" in name else x for name, x in arrays.items()}
    for name, layer in RECORD["layers"].items():
        blocks = np.array([[int(block) for block in row] for row in layer["held_blocks"].split()])
        out, read = (RECORD["keys"][f"{name}.conv.weight"][axis] // blocks.shape[axis] for axis in (0, 1))
        arrays[f"{name}.mask"] = blocks.repeat(out, 0).repeat(read, 1)
    rows = list(resnets.compare_layers(RECORD, arrays))
    plain = [name for name, layer in RECORD["layers"].items() if layer["mask_equals_rule"]]
    assert len(plain) == 8
    assert len(rows) == 11 * 2 * 4 + len(plain) * 3
    assert all(row.passes for row in rows), table(rows)


def test_held_weights_are_computed_with_but_do_not_learn_also_in_a_copy():
    torch.manual_seed(0)
    layer = PSConv2d(8, 8, dense=True)
    held = layer.held.expand_as(layer.rest.weight)
    assert (layer.rest.weight[held] == 0).all()
    assert (layer.rest.weight[~held] != 0).all()
    x = torch.randn(1, 8, 6, 6)
    before = layer(x)
    with torch.no_grad():
        layer.rest.weight[held] = 1.0
    assert not torch.allclose(layer(x), before)
    for one in (layer, copy.deepcopy(layer)):
        one(x).square().sum().backward()
        assert (one.rest.weight.grad[held] == 0).all()
        assert (one.rest.weight.grad[~held] != 0).all()


def test_gathered_weights_compute_the_same_and_others_than_0_are_refused():
    torch.manual_seed(0)
    dense, cheap = PSConv2d(32, 16, groups=4, dense=True), PSConv2d(32, 16, groups=4)
    state = dense.state_dict()
    cheap.load_state_dict(state | {"rest.weight": gather(state["rest.weight"], groups=4)})
    x = torch.randn(1, 32, 7, 5)
    torch.testing.assert_close(cheap(x), dense(x))
    state["rest.weight"][2, 5, 1, 1] = 1e-30
    with pytest.raises(ValueError, match=r"expected 0 where .*, got 1 other weights of 576, up to 1e-30"):
        gather(state["rest.weight"], groups=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 1, 2, 1, 3), "parts: expected an even number, got 3"),
        ((8, 8, 1, 2, 1, 0), "parts: expected an even number, got 0"),
        ((8, 8, 1, 2, 4), "in_channels: expected a multiple of 16, 4 blocks in each of 4 groups, got 8"),
        ((8, 6), "out_channels: expected a multiple of 4, 4 blocks in each of 1 groups, got 6"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PSConv2d(*arguments)
