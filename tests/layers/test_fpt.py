import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dyhead.layers import FPT
from dyhead.layers.fpt import SIMILARITIES, GroundingTransformer, RenderingTransformer, SelfTransformer
from tools.originals import fpt as originals
from tools.originals.rows import table

RECORD = Path(__file__).parent / "fpt" / "fpt.json"


def test_modules_compute_what_the_authors_code_does():
    with np.load(RECORD.with_suffix(".npz")) as arrays:
        rows = list(originals.compare(json.loads(RECORD.read_text()), dict(arrays)))
    assert len(rows) == len(originals.CASES) == 8
    assert all(row.passes for row in rows), table(rows)


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def vectors(maps):
    """The cells of (1, C, H, W), row by row, as lists of C numbers."""
    return maps[0].flatten(1).T.tolist()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def weighed(weights, of):
    return [sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*of, strict=True)]


def averaged(x):
    """Means of the cells within the image of 3 x 3 windows, two cells apart, from the corner on."""
    _, _, height, width = x.shape
    rows = [
        [x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(dim=(2, 3)) for j in range(0, width, 2)]
        for i in range(0, height, 2)
    ]
    return torch.stack([torch.stack(row, dim=2) for row in rows], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1)])
def test_a_cell_sees_its_level_as_the_formula_says(randomize, size):
    module = randomize(SelfTransformer(6, parts=2).double()).eval()
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    small = averaged(x)
    q, k, v = vectors(module.query_key(x)), vectors(module.query_key(small)), vectors(module.value(small))
    mean = [sum(column) / len(q) for column in zip(*q, strict=True)]
    shares = softmax([dot(row, mean) for row in module.mixture.weight.tolist()])
    seen = []
    for cell in q:
        parts = [softmax([dot(cell[p], other[p]) / math.sqrt(6) for other in k]) for p in (slice(0, 3), slice(3, 6))]
        seen.append(weighed(weighed(shares, parts), v))
    y = torch.tensor(seen, dtype=torch.float64).T.reshape(1, 6, *size)
    torch.testing.assert_close(module(x), x + module.out(y))


@torch.no_grad()
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("fine", "coarse"), [((3, 4), (2, 2)), ((5, 3), (1, 1))])
def test_a_cell_sees_a_coarser_level_as_the_formula_says(randomize, similarity, fine, coarse):
    module = randomize(GroundingTransformer(6, similarity=similarity).double(), std=1.0).eval()
    x, y = (torch.randn(1, 6, *size, dtype=torch.float64) for size in (fine, coarse))
    q, k, v = vectors(module.query(x)), vectors(module.key(y)), vectors(module.value(y))
    alike = {
        "dot": lambda cell: [dot(cell, other) / len(k) for other in k],
        "softmax": lambda cell: softmax([dot(cell, other) for other in k]),
        "distance": lambda cell: softmax([-sum((a - b) ** 2 for a, b in zip(cell, other, strict=True)) for other in k]),
    }[similarity]
    seen = torch.tensor([weighed(alike(cell), v) for cell in q], dtype=torch.float64).T.reshape(1, 3, *fine)
    torch.testing.assert_close(module(x, y), module.out(seen))


@pytest.mark.parametrize("octaves", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 24), (15, 9)])
def test_a_level_is_rendered_by_one_several_octaves_finer(octaves, size):
    fine = torch.randn(2, 4, *size, dtype=torch.float64)
    coarse = torch.randn(2, 4, *(math.ceil(n / 2**octaves) for n in size), dtype=torch.float64)
    module = RenderingTransformer(4, octaves=octaves).double().eval()
    padded = functional.pad(fine, [1, 1, 1, 1])
    step, weight = 2**octaves, module.down.conv.weight
    strided = torch.zeros_like(coarse)
    for i in range(strided.shape[2]):
        for j in range(strided.shape[3]):
            window = padded[:, :, i * step : i * step + 3, j * step : j * step + 3]
            strided[:, :, i, j] = torch.einsum("ncyx,dcyx->nd", window, weight)
    gate = module.gate.norm(module.gate.conv(fine.mean(dim=(2, 3), keepdim=True))).relu()
    want = (module.down.norm(strided) + module.coarse.norm(module.coarse.conv(coarse)) * gate).relu()
    torch.testing.assert_close(module(coarse, fine), want)


@torch.no_grad()
def test_levels_are_fused_from_all_of_them(make_pyramid, randomize):
    neck = randomize(FPT(8, 3).double()).eval()
    a, b, c = levels = make_pyramid(9, 13, levels=3)
    top, middle, last = neck.levels
    want = [
        top.fuse(torch.cat([top.itself(a), top.grounding[0](a, b), top.grounding[1](a, c), a], dim=1)),
        middle.fuse(torch.cat([middle.itself(b), middle.grounding[0](b, c), middle.rendering[0](b, a), b], dim=1)),
        last.fuse(torch.cat([last.itself(c), last.rendering[0](c, a), last.rendering[1](c, b), c], dim=1)),
    ]
    for got, expected in zip(neck(levels), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert list(neck({"p3": a, "p4": b, "p5": c})) == ["p3", "p4", "p5"]


def test_one_level_has_itself_alone(make_pyramid):
    (level,) = make_pyramid(3, 2, levels=1)
    assert FPT(8, 1).double()([level])[0].shape == level.shape


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_learns_from_one_image_and_from_levels_of_one_cell(make_pyramid, randomize, norm):
    neck = randomize(FPT(8, 3, norm=norm).double()).train()
    levels = [level.requires_grad_() for level in make_pyramid(3, 2, batch=1)]
    assert levels[-1].shape[2:] == (1, 1)
    sum(level.square().sum() for level in neck(levels)).backward()
    found = [*neck.parameters(), *levels]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in found)
    assert all(x.isfinite().all() for x in neck.buffers())


def test_what_a_cell_sees_of_its_level_is_dropped_in_training_alone(make_pyramid):
    (level,) = make_pyramid(8, 8, levels=1)
    for dropout in (0.9, 0.0):
        module = SelfTransformer(8, dropout=dropout).double()
        with torch.no_grad():
            assert torch.equal(module.train()(level), module(level)) == (dropout == 0)
            assert torch.equal(module.eval()(level), module(level))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_runs_under_autocast(make_pyramid, similarity):
    neck = FPT(8, 3, similarity=similarity).train()
    levels = make_pyramid(17, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = neck(levels)
    assert [level.dtype for level in out] == [torch.bfloat16] * 3
    sum(level.float().sum() for level in out).backward()
    assert all(x.grad.isfinite().all() for x in neck.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels: expected an integer from 1 .* got 0"),
        ({"num_levels": 0}, "num_levels: expected an integer from 1 .* got 0"),
        ({"parts": 3}, "parts: expected a divisor of the 8 channels, got 3"),
        ({"similarity": "cosine"}, "similarity: expected one of 'dot', 'softmax', 'distance', got 'cosine'"),
        ({"dropout": 1.0}, "dropout: expected a probability from 0 to below 1, got 1.0"),
        ({"norm": "FrozenBN"}, "norm: expected one of 'BN', 'SyncBN', got 'FrozenBN'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FPT(**{"channels": 8, "num_levels": 2} | arguments)


def test_a_pyramid_of_other_levels_is_refused(make_pyramid):
    with pytest.raises(ValueError, match="pyramid: expected 2 levels, got 3"):
        FPT(8, 2)(make_pyramid(8, 8, levels=3))
    with pytest.raises(ValueError, match="level 1: expected half the size of level 0"):
        FPT(8, 2)([torch.zeros(1, 8, 5, 5), torch.zeros(1, 8, 2, 2)])
