"""Deformable RoI pooling against torchvision's RoIAlign, slow loops and a case by hand."""

import math
from itertools import product

import pytest
import torch
from torchvision.ops import roi_align

from dyhead.ops import backend, deform_roi_pool

BACKENDS = pytest.mark.parametrize("name", ["compiled", "reference"])
CONVENTIONS = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "published"])


def make_regions(*, channels=3, size=(9, 11), side=3, dtype=torch.float64, seed=0):
    """A map of stride 8, regions of both images in and around it, some of them without a size, and offsets."""
    torch.manual_seed(seed)
    x = torch.randn(2, channels, *size).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rois = torch.tensor(
        [[0, 1, 2, 30, 40], [1, -20, -9, 50.3, 100], [1, 3, 3, 4.5, 5], [0, 61, 62, 50, 50], [0, 12.5, 20, 12.5, 20]]
    )
    return x, rois.to(wide), torch.randn(len(rois), 2, side, side).to(wide)


def pooled_slowly(x, rois, offset, side, scale, samples, gamma, aligned):
    """A cell, a sample and a channel at a time."""
    out = torch.zeros(len(rois), x.shape[1], side, side, dtype=torch.float64)
    height, width = x.shape[2:]
    for q, i, j in product(range(len(rois)), range(side), range(side)):
        n, *corners = rois[q].tolist()
        if aligned:
            left, top, right, bottom = (c * scale - 0.5 for c in corners)
        else:
            left, top, right, bottom = (math.copysign(math.floor(abs(c) + 0.5), c) for c in corners)
            left, top, right, bottom = (c * scale - 0.5 for c in (left, top, right + 1, bottom + 1))
        w, h = right - left, bottom - top
        w, h = (w, h) if aligned else (max(w, 0.1), max(h, 0.1))
        dx, dy = offset[q, :, i, j].tolist()
        values = []
        for r, s in product(range(samples), range(samples)):
            r, s = (r + 0.5, s + 0.5) if aligned else (r, s)
            y = top + h * ((i + r / samples) / side + gamma * dy)
            x_ = left + w * ((j + s / samples) / side + gamma * dx)
            margin = 1 if aligned else 0.5
            if not (-margin <= y <= height - 1 + margin and -margin <= x_ <= width - 1 + margin):
                values += [torch.zeros(x.shape[1], dtype=torch.float64)] if aligned else []
                continue
            y, x_ = min(max(y, 0), height - 1), min(max(x_, 0), width - 1)
            value = torch.zeros(x.shape[1], dtype=torch.float64)
            for row, column in product(range(height), range(width)):
                share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x_ - column))
                value += share * x[int(n), :, row, column].double()
            values.append(value)
        if values:
            out[q, :, i, j] = sum(values) / len(values)
    return out


@BACKENDS
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_without_offsets_it_is_aligned_roi_align(name, samples):
    x, rois, _ = make_regions()
    with backend(name):
        torch.testing.assert_close(
            deform_roi_pool(x, rois, None, 4, 0.125, samples), roi_align(x, rois, 4, 0.125, samples, True)
        )


@BACKENDS
@CONVENTIONS
@pytest.mark.parametrize("samples", [1, 2])
def test_equals_slow_loops(name, aligned, samples):
    x, rois, offset = make_regions()
    for shift in (offset, 30 * offset):  # near the map and far from it
        with backend(name):
            out = deform_roi_pool(x, rois, shift, 3, 0.125, samples, 0.3, aligned=aligned)
        torch.testing.assert_close(out, pooled_slowly(x, rois, shift, 3, 0.125, samples, 0.3, aligned))


def test_by_hand():
    """A map 0 1 2 3 / 4 5 6 7 and a region of its four pixels on the left, in one cell of one sample."""
    x = torch.arange(8.0).view(1, 1, 2, 4).requires_grad_()
    rois = torch.tensor([[0.0, 0, 0, 2, 2]])
    offset = torch.tensor([5.0, -2.0]).view(1, 2, 1, 1).requires_grad_()
    # The sample is at (0.5, 0.5); 5 tenths of the width 2 to the right, and 2 tenths of the height 2 up: (1.5, 0.1).
    out = deform_roi_pool(x, rois, offset, 1, 1.0, 1)
    assert out.item() == pytest.approx(1.9)
    out.backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[[0, 0.45, 0.45, 0], [0, 0.05, 0.05, 0]]]]))
    # A pixel to the right is 1 more, a pixel down 4; a unit of the offset is 0.2 pixels.
    torch.testing.assert_close(offset.grad.flatten(), torch.tensor([0.2, 0.8]))
    # As published the far corner is (3, 3), the size 3, and the sample at the cell's upper left: (-0.5, -0.5), which is
    # read as (0, 0), and with the offset at (1, -1.1), which is not read.
    assert deform_roi_pool(x, rois, None, 1, 1.0, 1, aligned=False).item() == 0
    assert deform_roi_pool(x + 1, rois, None, 1, 1.0, 1, aligned=False).item() == 1
    assert deform_roi_pool(x + 1, rois, offset, 1, 1.0, 1, aligned=False).item() == 0
    down = torch.tensor([5.0, 2.5]).view(1, 2, 1, 1)  # to (1, 0.25)
    assert deform_roi_pool(x, rois, down, 1, 1.0, 1, aligned=False).item() == 2


def test_published_corners_are_rounded_away_from_zero():
    x = torch.arange(8.0).view(1, 1, 1, 8)
    for left, rounded in ((0.5, 1), (1.5, 2), (2.5, 3), (1.49, 1), (-0.5, -1)):
        got, want = (
            deform_roi_pool(x, torch.tensor([[0.0, first, 0, 6, 0]]), None, 1, 1.0, 2, aligned=False)
            for first in (left, rounded)
        )
        assert torch.equal(got, want)


def test_an_offset_of_all_cells_moves_the_region():
    x, rois, offset = make_regions()
    moved = rois.clone()
    moved[:, 1:] += 0.2 * torch.tensor([1.0, -0.5]).repeat(2) * (rois[:, 3:] - rois[:, 1:3]).repeat(1, 2)
    offset[:, 0], offset[:, 1] = 1.0, -0.5
    got, want = deform_roi_pool(x, rois, offset, 3, 0.125, gamma=0.2), deform_roi_pool(x, moved, None, 3, 0.125)
    torch.testing.assert_close(got, want)


@BACKENDS
@CONVENTIONS
def test_gradients_are_those_of_finite_differences(name, aligned):
    x, rois, offset = make_regions(channels=2, size=(4, 5), side=2)

    def run(x, offset):
        with backend(name):
            return deform_roi_pool(x, rois, offset, 2, 0.125, 2, 0.3, aligned=aligned)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), offset.requires_grad_()))


@CONVENTIONS
def test_the_reference_has_second_derivatives(aligned):
    x, rois, offset = make_regions(channels=1, size=(4, 5), side=2)
    with backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda x, offset: deform_roi_pool(x, rois, offset, 2, 0.125, 1, 0.3, aligned=aligned),
            (x.requires_grad_(), offset.requires_grad_()),
        )


@BACKENDS
@CONVENTIONS
def test_hostile_regions_and_offsets_read_nothing_and_have_no_gradient(name, aligned):
    far = [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31, -(2.0**31)]
    x = torch.rand(1, 2, 4, 5).add(1).requires_grad_()
    rois = torch.tensor([[0, 0, 0, 4, 4.0]]).repeat(5 * len(far) + 2, 1)
    for i, value in enumerate(far):
        for place in range(5):
            rois[5 * i + place, place] = value
    rois[-2, 0], rois[-1, 0] = 1, -1  # images that are not there
    offset = torch.zeros(len(rois) + len(far), 2, 3, 3)
    for i, value in enumerate(far):
        offset[len(rois) + i, i % 2] = value
    rois = torch.cat([rois, torch.tensor([[0, 0, 0, 4, 4.0]]).repeat(len(far), 1)])
    offset.requires_grad_()
    with backend(name):
        out = deform_roi_pool(x, rois, offset, 3, aligned=aligned)
        grads = torch.autograd.grad(out.sum(), (x, offset))
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    nothing = [*range(0, 35, 5), 35, 36, *range(37, 37 + len(far))]
    assert not out[nothing].any()
    assert not grads[1][nothing].any()
    with backend(name):
        clean = deform_roi_pool(x, rois[nothing[:1]].nan_to_num(0), None, 3, aligned=aligned)
    assert clean.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CONVENTIONS
def test_half_types_round_what_is_read_and_written(dtype, aligned):
    x, rois, offset = make_regions(dtype=dtype)
    out = deform_roi_pool(x, rois, offset, 3, 0.125, aligned=aligned)
    assert out.dtype == dtype
    want = deform_roi_pool(x.double(), rois.double(), offset.double(), 3, 0.125, aligned=aligned)
    torch.testing.assert_close(out.double(), want, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
    narrow = deform_roi_pool(x, rois.half(), offset.half(), 3, 0.125, aligned=aligned)
    assert torch.equal(
        narrow, deform_roi_pool(x, rois.half().float(), offset.half().float(), 3, 0.125, aligned=aligned)
    )


@BACKENDS
def test_layout_strides_and_no_regions(name):
    x, rois, offset = make_regions(channels=4)
    last = x.contiguous(memory_format=torch.channels_last)
    with backend(name):
        want, got = (deform_roi_pool(each, rois, offset, 3) for each in (x, last))
        empty = deform_roi_pool(x.requires_grad_(), rois[:0], offset[:0].requires_grad_(), 3)
        strided = deform_roi_pool(x.mT.contiguous().mT, rois.T.contiguous().T, offset, 3)
    assert want.is_contiguous()
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(strided, want)
    assert empty.shape == (0, 4, 3, 3)
    empty.sum().backward()
    assert not x.grad.any()


def test_regions_are_constants_and_autocast_changes_no_type():
    x, rois, offset = make_regions(dtype=torch.float32)
    assert not deform_roi_pool(x, rois.requires_grad_(), offset, 3).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        out = deform_roi_pool(x, rois, offset, 3)
    assert torch.equal(out, deform_roi_pool(x, rois, offset, 3))


def test_compiles_for_any_number_of_regions():
    compiled = torch.compile(deform_roi_pool, backend="aot_eager", fullgraph=True, dynamic=True)
    x, rois, offset = make_regions()
    for count in (5, 4, 3):
        arguments = x.requires_grad_(), rois[:count], offset[:count].requires_grad_(), 3, 0.125
        results = [function(*arguments) for function in (compiled, deform_roi_pool)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*[torch.autograd.grad(each.square().sum(), x) for each in results])


x, rois, offset = make_regions(dtype=torch.float32)
WRONG = [
    ("x: expected a tensor, got 3", (3, rois, offset, 3)),
    ("rois: expected a tensor, got None", (x, None, offset, 3)),
    ("x: expected float64, float32, bfloat16 or float16, got torch.int64", (x.long(), rois, offset, 3)),
    (r"x: expected \(N, C, H, W\) with at least one channel and one pixel", (x[:, :, :0], rois, offset, 3)),
    (r"rois: expected \(Q, 5\), got \(5, 4\)", (x, rois[:, 1:], offset, 3)),
    ("rois: expected torch.float32 or a narrower floating type, got torch.float64", (x, rois.double(), offset, 3)),
    ("rois: expected cpu, got meta", (x, rois.to("meta"), offset, 3)),
    (r"offset: expected \(5, 2, 4, 4\), got \(5, 2, 3, 3\)", (x, rois, offset, 4)),
    (r"offset: expected \(5, 2, 3, 3\), got \(4, 2, 3, 3\)", (x, rois, offset[1:], 3)),
    ("output_size: expected an integer from 1 to 255, got 0", (x, rois, offset, 0)),
    ("output_size: expected an integer from 1 to 255, got True", (x, rois, offset, True)),
    ("spatial_scale: expected a finite number above 0, got 0", (x, rois, offset, 3, 0)),
    ("spatial_scale: expected a finite number above 0, got nan", (x, rois, offset, 3, math.nan)),
    ("sampling_ratio: expected an integer from 1 to 255, got 0", (x, rois, offset, 3, 1.0, 0)),
    ("gamma: expected a finite number, got '0.1'", (x, rois, offset, 3, 1.0, 2, "0.1")),
]


@pytest.mark.parametrize(("message", "arguments"), WRONG, ids=[message for message, _ in WRONG])
def test_wrong_arguments_are_named(message, arguments):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        deform_roi_pool(*arguments)
