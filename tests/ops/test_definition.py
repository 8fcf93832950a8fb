"""Both implementations against what others define: torchvision's operator, grid sampling, and exact closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

from dyhead import ops
from dyhead.ops import reference

IMPLEMENTATIONS = pytest.mark.parametrize("module", [reference, ops], ids=["reference", "operator"])


def convolution(batch=2, channels=6, out_channels=4, groups=1, offset_groups=1, kernel=(3, 3), size=(9, 11), **given):
    """(input, offset, weight, bias, mask) in float64 and the geometry with its defaults."""
    torch.manual_seed(1)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), **given}
    stride, padding, dilation = geometry["stride"], geometry["padding"], geometry["dilation"]
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    taps = kernel[0] * kernel[1]
    tensors = [
        torch.randn(batch, channels, *size),
        torch.randn(batch, 2 * offset_groups * taps, *out) * 3,
        torch.randn(out_channels, channels // groups, *kernel),
        torch.randn(out_channels),
        torch.rand(batch, offset_groups * taps, *out),
    ]
    return [tensor.double().requires_grad_() for tensor in tensors], geometry


def run(function, tensors, geometry):
    """The result and the gradients of (input, offset, weight, bias, mask), of which the last two may be None."""
    input, offset, weight, bias, mask = tensors
    result = function(input, offset, weight, bias, mask=mask, **geometry)
    torch.manual_seed(2)
    leaves = [tensor for tensor in tensors if tensor is not None]
    return [result, *torch.autograd.grad(result, leaves, torch.randn(result.shape, dtype=result.dtype))]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)},
        {"kernel": (3, 1), "stride": (1, 3), "padding": (0, 1), "dilation": (3, 2), "groups": 2},
        {"offset_groups": 3, "padding": (1, 1)},
        {"groups": 3, "out_channels": 6, "offset_groups": 2, "padding": (2, 0)},
        {"channels": 7, "groups": 7, "out_channels": 7, "kernel": (1, 1)},
        {"batch": 0},
        {"batch": 1, "channels": 70, "out_channels": 33, "size": (1, 130), "padding": (1, 1)},
    ],
    ids=str,
)
def test_convolution_geometry_is_torchvisions(module, options):
    tensors, geometry = convolution(**options)
    expected = run(torchvision_deform_conv2d, tensors, geometry)
    torch.testing.assert_close(run(module.deform_conv2d, tensors, geometry), expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize("missing", [(3,), (4,), (3, 4)], ids=["bias", "mask", "both"])
def test_optional_arguments_may_be_missing(module, missing):
    tensors, geometry = convolution()
    tensors = [None if i in missing else tensor for i, tensor in enumerate(tensors)]
    expected = run(torchvision_deform_conv2d, tensors, geometry)
    torch.testing.assert_close(run(module.deform_conv2d, tensors, geometry), expected)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t])[len(t) :],
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t,
    ],
    ids=["channels_last", "strided", "offset_into_storage", "transposed"],
)
def test_any_memory_layout(module, layout):
    tensors, geometry = convolution(padding=(1, 1))
    expected = run(torchvision_deform_conv2d, tensors, geometry)
    laid_out = [layout(tensor.detach()).requires_grad_() for tensor in tensors]
    torch.testing.assert_close(run(module.deform_conv2d, laid_out, geometry), expected)


@IMPLEMENTATIONS
def test_integers_stand_for_pairs(module):
    tensors, _ = convolution(stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    expected = run(torchvision_deform_conv2d, tensors, {"stride": 2, "padding": 1, "dilation": 2})
    torch.testing.assert_close(run(module.deform_conv2d, tensors, {"stride": 2, "padding": 1, "dilation": 2}), expected)


@IMPLEMENTATIONS
def test_both_geometries_agree_on_one_level_of_scale_one(module):
    tensors, geometry = convolution(padding=(2, 1), dilation=(2, 1))
    input, offset, weight, bias, mask = tensors
    expected = module.deform_conv2d(input, offset, weight, bias, mask=mask, **geometry)
    got = module.pyramid_deform_conv2d([input], offset, weight[None], bias, mask, dilation=(2, 1))
    torch.testing.assert_close(got, expected)


def grid_sampled(case):
    """The aligned operator from grid_sample, for levels whose sizes are exact multiples of the output's or its parts.

    In coordinates of the whole image, which grid_sample takes, a tap stands at the same place on every level.
    """
    _, _, kh, kw = case.weight.shape[1:]
    n, _, height, width = case.offset.shape
    groups = case.offset.shape[1] // (2 * kh * kw)
    dilation = case.geometry[4]
    offset = case.offset.view(n, groups, kh, kw, 2, height, width)
    mask = case.mask.view(n, groups, kh, kw, height, width)
    result = case.bias.view(1, -1, 1, 1)
    for level, feature in enumerate(case.features):
        parts = feature.view(n, groups, -1, *feature.shape[2:])
        for r in range(kh):
            for s in range(kw):
                rows = torch.arange(height).view(-1, 1) + dilation[0] * (r - (kh - 1) / 2) + offset[:, :, r, s, 0]
                columns = torch.arange(width) + dilation[1] * (s - (kw - 1) / 2) + offset[:, :, r, s, 1]
                grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
                sampled = [
                    F.grid_sample(parts[:, g], grid[:, g], align_corners=False) * mask[:, g, r, s].unsqueeze(1)
                    for g in range(groups)
                ]
                sampled = torch.cat(sampled, 1) * case.level_weight[:, level].view(n, 1, 1, 1)
                result = result + torch.einsum("oc,nchw->nohw", case.weight[level, :, :, r, s], sampled)
    return result


@pytest.mark.parametrize("function", [reference.pyramid_deform_conv, torch.ops.dyhead.pyramid_deform_conv2d])
@pytest.mark.parametrize(
    "options",
    [
        {"size": (6, 8), "levels": ((12, 16), (6, 8), (3, 4))},
        {"size": (4, 5), "levels": ((4, 5),), "kernel": (2, 4), "dilation": (2, 1)},
        {"size": (6, 4), "levels": ((18, 12), (3, 2)), "offset_groups": 2, "kernel": (1, 3)},
    ],
    ids=str,
)
def test_aligned_geometry_reads_the_same_place_on_every_level(function, options, make_case):
    case = make_case(**options)
    expected = grid_sampled(case)
    torch.testing.assert_close(
        case.run(function), (expected, list(torch.autograd.grad(expected, case.tensors(), case.grad)))
    )


@IMPLEMENTATIONS
def test_finer_level_is_averaged_and_coarser_level_interpolated(module):
    torch.manual_seed(0)
    finer, coarser = torch.randn(1, 3, 12, 16), torch.randn(1, 3, 3, 4)
    weight, offset = torch.eye(3).view(1, 3, 3, 1, 1), torch.zeros(1, 2, 6, 8)
    torch.testing.assert_close(module.pyramid_deform_conv2d([finer], offset, weight), F.avg_pool2d(finer, 2))
    expected = F.interpolate(coarser, scale_factor=2, mode="bilinear", align_corners=False)
    got = module.pyramid_deform_conv2d([coarser], offset, weight)
    # At the border of the map, interpolate repeats pixels and the operator pads with zeros.
    torch.testing.assert_close(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


@IMPLEMENTATIONS
def test_a_ramp_over_the_image_reads_as_itself_from_every_level(module):
    """Bilinear interpolation of a linear function is exact, so whatever the scale an offset moves along the line."""
    stride, strides = 8, (4, 8, 16, 12)

    def ramp(y, x):
        return 3 * y - 2 * x + 5

    def centres(size, step):
        return (torch.arange(size, dtype=torch.float64) + 0.5) * step

    levels = [ramp(centres(480 // s, s).view(-1, 1), centres(480 // s, s)).view(1, 1, 480 // s, -1) for s in strides]
    torch.manual_seed(3)
    offset = torch.rand(1, 2, 60, 60, dtype=torch.float64) * 6 - 3
    weight = torch.ones(4, 1, 1, 1, 1, dtype=torch.float64)
    got = module.pyramid_deform_conv2d(levels, offset, weight, scales=[stride / s for s in strides])
    y = (torch.arange(60).view(-1, 1) + offset[0, 0] + 0.5) * stride
    x = (torch.arange(60) + offset[0, 1] + 0.5) * stride
    torch.testing.assert_close(got[0, 0, 8:-8, 8:-8], 4 * ramp(y, x)[8:-8, 8:-8])


@IMPLEMENTATIONS
def test_scales_follow_the_heights_unless_given(module):
    torch.manual_seed(0)
    feature, offset, weight = torch.randn(1, 2, 13, 21), torch.zeros(1, 18, 25, 42), torch.randn(1, 2, 2, 3, 3)
    default = module.pyramid_deform_conv2d([feature], offset, weight)
    torch.testing.assert_close(default, module.pyramid_deform_conv2d([feature], offset, weight, scales=[13 / 25]))
    assert not torch.allclose(default, module.pyramid_deform_conv2d([feature], offset, weight, scales=[0.5]))


def test_reference_has_second_derivatives(make_case):
    case = make_case(
        batch=1, channels=2, out_channels=2, size=(2, 3), levels=((4, 6), (2, 3)), kernel=(1, 2), spread=0.3
    )

    def function(*tensors):
        features, (offset, weight, bias, mask, level_weight) = list(tensors[:2]), tensors[2:]
        return reference.pyramid_deform_conv(features, offset, weight, bias, mask, level_weight, *case.geometry)

    assert torch.autograd.gradgradcheck(function, case.tensors())
