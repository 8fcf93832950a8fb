"""What the operator accepts. The compiled operator makes the same checks itself, in C++ (csrc/arguments.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of positions, masks and sums for features of `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fail(argument: str, expected, got) -> None:
    raise RuntimeError(f"{argument}: expected {expected}, got {got}")


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(int(size)) for size in tensor.shape) + ("," if tensor.dim() == 1 else "") + ")"


def _expect_shape(argument: str, tensor: Tensor, expected: Sequence) -> None:
    if tensor.dim() != len(expected) or any(
        not isinstance(size, str) and tensor.shape[i] != size for i, size in enumerate(expected)
    ):
        comma = "," if len(expected) == 1 else ""
        _fail(argument, "(" + ", ".join(str(size) for size in expected) + comma + ")", _shape(tensor))


def convolution_output_size(size, kernel: int, stride: int, padding: int, dilation: int):
    """Pixels of the output grid along one axis, as for any convolution."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def check_arguments(
    features: Sequence[Tensor],
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    level_weight: Tensor | None,
    aligned: bool,
    scales: Sequence[float] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises RuntimeError naming the argument, what was expected and what came, unless the operator can run.

    The arguments are the raw operator's: `scales` is None for the default, the others (vertical, horizontal) pairs.
    """
    if len(features) == 0:
        _fail("features", "at least one level", "an empty list")
    first = features[0]
    if first.dtype not in DTYPES:
        _fail("features[0]", "float64, float32, bfloat16 or float16", first.dtype)
    positions = accumulation_dtype(first.dtype)
    optional = [("mask", mask, positions), ("bias", bias, first.dtype), ("level_weight", level_weight, positions)]
    for name, tensor, dtype in [
        *((f"features[{level}]", feature, first.dtype) for level, feature in enumerate(features)),
        ("offset", offset, positions),
        ("weight", weight, first.dtype),
        *(entry for entry in optional if entry[1] is not None),
    ]:
        if tensor.dtype != dtype:
            _fail(name, dtype, tensor.dtype)
        if tensor.device != first.device:
            _fail(name, first.device, tensor.device)

    for name, pair, least in [("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)]:
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            _fail(name, f"two integers of at least {least}", tuple(pair))

    if first.dim() != 4:
        _fail("features[0]", "(N, C, H, W)", _shape(first))
    batch, channels = first.shape[0], first.shape[1]
    for level, feature in enumerate(features):
        _expect_shape(f"features[{level}]", feature, (batch, channels, "H", "W"))
        if feature.shape[1] < 1 or feature.shape[2] < 1 or feature.shape[3] < 1:
            _fail(f"features[{level}]", "at least one channel and one pixel", _shape(feature))

    if weight.dim() != 5 or weight.shape[0] != len(features):
        _fail("weight", f"({len(features)}, C_out, C_in/groups, kh, kw)", _shape(weight))
    _, out_channels, group_channels, kh, kw = weight.shape
    if out_channels < 1 or group_channels < 1 or kh < 1 or kw < 1:
        _fail("weight", "no empty dimension", _shape(weight))
    if channels % group_channels != 0:
        _fail("weight", f"C_in/groups to divide the features' {channels} channels", _shape(weight))
    groups = channels // group_channels
    if out_channels % groups != 0:
        _fail("weight", f"C_out to be a multiple of the {groups} groups", _shape(weight))
    if bias is not None:
        _expect_shape("bias", bias, (out_channels,))

    taps = kh * kw
    if offset.dim() != 4:
        _fail("offset", "(N, 2*G*K, H, W)", _shape(offset))
    if aligned:
        height, width = offset.shape[2], offset.shape[3]
        if height < 1 or width < 1:
            _fail("offset", "an output grid of at least one pixel", _shape(offset))
    else:
        if len(features) != 1:
            _fail("features", "one level in the convolution geometry", f"{len(features)} levels")
        height = convolution_output_size(first.shape[2], kh, stride[0], padding[0], dilation[0])
        width = convolution_output_size(first.shape[3], kw, stride[1], padding[1], dilation[1])
        if height < 1 or width < 1:
            _fail("weight", f"a kernel no larger than the padded features {_shape(first)}", _shape(weight))
    if offset.shape[1] < 1 or offset.shape[1] % (2 * taps) != 0:
        _fail("offset", f"a multiple of 2*K = {2 * taps} channels", _shape(offset))
    _expect_shape("offset", offset, (batch, offset.shape[1], height, width))
    offset_groups = offset.shape[1] // (2 * taps)
    if channels % offset_groups != 0:
        _fail("offset", f"offset groups that divide the features' {channels} channels", f"{offset_groups} groups")
    if mask is not None:
        _expect_shape("mask", mask, (batch, offset_groups * taps, height, width))
    if level_weight is not None:
        _expect_shape("level_weight", level_weight, (batch, len(features)))
    if scales is not None and len(scales) != len(features):
        _fail("scales", f"{len(features)} numbers, one a level", f"{len(scales)}")
    for level, scale in enumerate(scales or ()):
        if not 0 < scale < float("inf"):
            _fail(f"scales[{level}]", "a positive finite number", scale)
