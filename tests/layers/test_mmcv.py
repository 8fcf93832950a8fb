"""mmcv is not needed: torchvision computes the same from inputs of one type, and mmcv's indexing is written out."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torchvision.ops import deform_conv2d

from dyhead.layers import ModulatedDeformConv2d, mmcv


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def inputs(groups=2):
    """Of a 3x3 convolution of stride 2, padding 2 and dilation 2."""
    return noise(2, 8, 9, 11), 2 * noise(2, 18 * groups, 5, 6), noise(2, 9 * groups, 5, 6).sigmoid()


GEOMETRY = {"stride": 2, "padding": 2, "dilation": (2, 2)}


def test_samples_as_torchvision_does():
    layer = mmcv.ModulatedDeformConv2d(8, 12, 3, **GEOMETRY, groups=4, deform_groups=2)
    x, offset, mask = inputs()
    torch.nn.init.normal_(layer.bias)
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, 2, 2, 2, mask)
    torch.testing.assert_close(layer(x, offset, mask), expected, rtol=1e-4, atol=1e-5)
    called = mmcv.modulated_deform_conv2d(x, offset, mask, layer.weight, layer.bias, 2, 2, 2, 4, 2)
    assert torch.equal(called, layer(x, offset, mask))


def test_without_masks_there_is_no_bias():
    layer = mmcv.DeformConv2d(8, 12, 3, **GEOMETRY, groups=4, deform_groups=2, im2col_step=64)
    x, offset, _ = inputs()
    expected = deform_conv2d(x, offset, layer.weight, None, 2, 2, 2)
    torch.testing.assert_close(layer(x, offset), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(mmcv.deform_conv2d(x, offset, layer.weight, 2, 2, 2, 4, 2), layer(x, offset))
    assert list(layer.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="bias: expected False, .*, got True"):
        mmcv.DeformConv2d(8, 12, 3, bias=True)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ModulatedDeformConv2d", ["weight", "bias"]),
        ("ModulatedDeformConv2dPack", ["weight", "bias", "conv_offset.weight", "conv_offset.bias"]),
        ("DeformConv2d", ["weight"]),
        ("DeformConv2dPack", ["weight", "conv_offset.weight", "conv_offset.bias"]),
    ],
)
def test_parameters_have_the_names_of_mmcvs_checkpoints(kind, names):
    layer = getattr(mmcv, kind)(8, 8, 3, padding=1)
    assert list(layer.state_dict()) == names
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))


def test_arguments_stand_in_mmcvs_order():
    geometry = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
    constructor = list(inspect.signature(mmcv.ModulatedDeformConv2d).parameters)
    assert constructor[:9] == [*geometry, "deform_groups", "bias"]
    constructor = list(inspect.signature(mmcv.DeformConv2d).parameters)
    assert constructor == [*geometry, "deform_groups", "bias", "im2col_step"]
    assert mmcv.ModulatedDeformConv2d is ModulatedDeformConv2d


def test_weights_start_as_mmcvs():
    layer = ModulatedDeformConv2d(64, 64, 3, groups=4)
    bound = 1 / np.sqrt(64 * 9)  # of all input channels, not of a group's
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.bias.eq(0).all()
    weight = mmcv.DeformConv2d(64, 64, 3, groups=4).weight
    assert 0.99 * np.sqrt(6 / (16 * 9)) < weight.abs().max() <= np.sqrt(6 / (16 * 9))


@pytest.mark.parametrize("kind", ["ModulatedDeformConv2dPack", "DeformConv2dPack"])
def test_a_pack_starts_as_a_convolution_and_learns_where_to_read(kind):
    layer = getattr(mmcv, kind)(8, 4, 3, **GEOMETRY, deform_groups=2)
    x = inputs()[0]
    importance = 0.5 if "Modulated" in kind else 1
    expected = importance * torch.nn.functional.conv2d(x, layer.weight, None, 2, 2, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    positions = layer.conv_offset(x)
    mask = positions[:, 36:].sigmoid() if "Modulated" in kind else None
    expected = deform_conv2d(x, positions[:, :36], layer.weight, None, 2, 2, 2, mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_everything_is_cast_to_the_type_of_the_offsets(dtype, autocast):
    """As a layer in autocast meets it: a convolution made the offsets, the map and the weights are float32."""
    layer = ModulatedDeformConv2d(8, 12, 3, **GEOMETRY, deform_groups=2)
    x, offset, mask = inputs()
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out = layer(x, offset.to(dtype), mask)
        wide = layer(x, offset, mask.to(dtype))  # offsets that were kept in float32
    assert out.dtype == dtype
    assert wide.dtype == torch.float32
    expected = deform_conv2d(
        x.to(dtype).float(),
        offset.to(dtype).float(),
        layer.weight.to(dtype).float(),
        None,
        2,
        2,
        2,
        mask.to(dtype).float(),
    )
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        wide, deform_conv2d(x, offset, layer.weight, None, 2, 2, 2, mask.to(dtype).float()), rtol=1e-4, atol=1e-5
    )
    out.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_runs_in_half_precision_as_a_whole():
    layer = ModulatedDeformConv2d(8, 12, 3, **GEOMETRY, deform_groups=2).half()
    assert layer(*(x.half() for x in inputs())).dtype == torch.float16


def read_flat(x, height, width):
    """What mmcv's kernels read: element (channel * height + i) * width + j of each image's memory."""
    out = np.zeros((*x.shape[:2], height, width), dtype=np.float32)
    for n, c, i, j in np.ndindex(*out.shape):
        out[n, c, i, j] = x[n].numpy().ravel()[(c * height + i) * width + j]
    return torch.from_numpy(out)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_larger_offsets_are_read_flat_behind_a_flag(memory_format):
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1, flat_offsets=True)
    x, offset, mask = noise(2, 4, 4, 5), noise(2, 18, 7, 9), noise(2, 9, 8, 10).sigmoid()
    expected = deform_conv2d(
        x, read_flat(offset, 4, 5), layer.weight, layer.bias, padding=1, mask=read_flat(mask, 4, 5)
    )
    out = layer(x, offset.to(memory_format=memory_format), mask.to(memory_format=memory_format))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": noise(2, 6, 9, 11)}, r"input: expected \(N, 8, H, W\), got \(2, 6, 9, 11\)"),
        ({"x": noise(8, 9, 11)}, r"input: expected \(N, 8, H, W\), got \(8, 9, 11\)"),
        ({"offset": noise(2, 18, 5, 6)}, r"offset: expected \(N, 36, H, W\), got \(2, 18, 5, 6\)"),
        ({"mask": noise(2, 36, 5, 6)}, r"mask: expected \(N, 18, H, W\), got \(2, 36, 5, 6\)"),
        (
            {"offset": noise(2, 36, 9, 11)},
            "offset: expected the output's size 5 x 6, got 9 x 11, which flat_offsets=True reads as mmcv does",
        ),
        ({"mask": noise(2, 18, 4, 6)}, "mask: expected the output's size 5 x 6, got 4 x 6"),
    ],
)
def test_names_what_does_not_fit(change, message):
    layer = ModulatedDeformConv2d(8, 12, 3, **GEOMETRY, deform_groups=2)
    arguments = dict(zip(("x", "offset", "mask"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


def test_flat_offsets_are_large_enough():
    layer = ModulatedDeformConv2d(8, 12, 3, **GEOMETRY, deform_groups=2, flat_offsets=True)
    x, _, mask = inputs()
    with pytest.raises(ValueError, match="offset: expected at least the output's size 5 x 6, got 3 x 9"):
        layer(x, noise(2, 36, 3, 9), mask)
