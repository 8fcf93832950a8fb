"""Checks of the operators' arguments. csrc/arguments.h makes those of the raw operators', with the same messages."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of positions, masks and sums for features of `dtype`: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_integer(value: object) -> int | None:
    """An integer as Python's, where it is one: Python's or NumPy's, or an array or a tensor of one without dimensions.

    None for everything else: a bool and a float, even a whole one, are most likely mistakes.
    """
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    if getattr(value, "ndim", 0) != 0 or str(getattr(value, "dtype", None)).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # not an integer, or a tensor without data
        return None


def as_pair(name: str, value: object, least: int) -> list[int]:
    """An integer, or two of them (vertical, horizontal), as two of Python's.

    Raises:
        RuntimeError: `value`, the argument `name`, is something else, below `least`, or more than 32 bits hold.
    """
    pair = [as_integer(item) for item in (value if is_list(value) else (value, value))]
    if len(pair) != 2 or not all(item is not None and least <= item < 2**31 for item in pair):
        _fail(name, f"an integer from {least} to {2**31 - 1}, or two of them (vertical, horizontal)", describe(value))
    return pair


def as_count(name: str, value: object) -> int:
    """An integer as Python's.

    Raises:
        RuntimeError: `value`, the argument `name`, is none from 1 to 255.
    """
    count = as_integer(value)
    if count is None or not 1 <= count <= 255:
        _fail(name, "an integer from 1 to 255", describe(value))
    return count


def as_flag(name: str, value: object) -> bool:
    """Raises RuntimeError unless `value`, the argument `name`, is True or False."""
    if not isinstance(value, bool):
        _fail(name, "True or False", describe(value))
    return value


def as_number(name: str, value: object, *, above: float | None = None) -> float:
    """A number as Python's.

    Raises:
        RuntimeError: `value`, the argument `name`, is no finite number, or none above `above`.
    """
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not (-math.inf if above is None else above) < number < math.inf:  # torch.compile cannot trace math.isfinite
        _fail(name, "a finite number" + ("" if above is None else f" above {above}"), describe(value))
    return number


def as_scales(values: object) -> list[float] | None:
    """Numbers as floats; None for None.

    Raises:
        RuntimeError: `values` is not a list of positive numbers below 2^31; in float32, positions could overflow.
    """
    if values is None:
        return None
    if not is_list(values):
        _fail("scales", "a list of numbers, one a level", describe(values))
    scales = []
    for level, value in enumerate(values):
        try:
            scale = None if isinstance(value, (bool, str, bytes)) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            scale = None
        if scale is None or not 0 < scale < 2**31:
            _fail(f"scales[{level}]", f"a number above 0 and below {2**31}", describe(value))
        scales.append(scale)
    return scales


def is_list(value: object) -> bool:
    """Whether it is a list, a tuple or another sequence, or an array or a tensor of one dimension; not text."""
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, (int, float, str, bytes, bytearray)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1


def expect_tensor(name: str, value: object, *, optional: bool = False) -> None:
    """Raises RuntimeError unless `value`, the argument `name`, is a tensor or, where it is optional, None."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        _fail(name, "a tensor", describe(value))


def describe(value: object) -> str:
    """`value` for an error, of no great length."""
    if getattr(value, "ndim", 0) > 0:
        return f"{type(value).__name__} {_text(value.shape)} of {value.dtype}"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of too many digits for Python to write
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_arguments(
    features: Sequence[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    level_weight: Tensor | None,
    aligned: bool,
    scales: Sequence[float] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises RuntimeError unless the arguments are valid; it names the argument, what was expected and what came.

    The arguments are the raw operator's: `scales` is None for the default, the others (vertical, horizontal) pairs.
    """
    if len(features) == 0:
        _fail("features", "at least one level", "an empty list")
    names = [f"features[{level}]" if aligned else "input" for level in range(len(features))]
    # deform_conv2d adds a level dimension to the weight, which its caller does not know.
    hidden = 0 if aligned else 1

    first = features[0]
    if first.dtype not in DTYPES:
        _fail(names[0], "float64, float32, bfloat16 or float16", first.dtype)
    for name, feature in zip(names, features, strict=True):
        _expect_like(name, feature, first.dtype, first)
    positions = accumulation_dtype(first.dtype)
    _expect_like("offset", offset, positions, first)
    _expect_like("weight", weight, first.dtype, first)
    _expect_like("bias", bias, first.dtype, first)
    _expect_like("mask", mask, positions, first)
    _expect_like("level_weight", level_weight, positions, first)
    _expect_pair("stride", stride, 1)
    _expect_pair("padding", padding, 0)
    _expect_pair("dilation", dilation, 1)

    if not aligned and len(features) != 1:
        _fail("features", "one level in the convolution geometry", f"{len(features)} levels")
    if first.dim() != 4:
        _fail(names[0], "(N, C, H, W)", _text(first.shape))
    batch, channels = first.shape[0], first.shape[1]
    for name, feature in zip(names, features, strict=True):
        if feature.dim() != 4 or feature.shape[0] != batch or feature.shape[1] != channels:
            _fail(name, f"({batch}, {channels}, H, W)", _text(feature.shape))
        if channels < 1 or feature.shape[2] < 1 or feature.shape[3] < 1:
            _fail(name, "at least one channel and one pixel", _text(feature.shape))

    levels = len(features)
    if weight.dim() != 5 or weight.shape[0] != levels:
        expected = f"({levels}, C_out, C_in/groups, kh, kw)" if aligned else "(C_out, C_in/groups, kh, kw)"
        _fail("weight", expected, _text(weight.shape[hidden:]))
    _, out_channels, group_channels, kh, kw = weight.shape
    if out_channels < 1 or group_channels < 1 or kh < 1 or kw < 1:
        _fail("weight", "no empty dimension", _text(weight.shape[hidden:]))
    if channels % group_channels != 0:
        expected = f"C_in/groups to divide the features' {channels} channels"
        _fail("weight", expected, _text(weight.shape[hidden:]))
    groups = channels // group_channels
    if out_channels % groups != 0:
        _fail("weight", f"C_out to be a multiple of the {groups} groups", _text(weight.shape[hidden:]))
    _expect_shape("bias", bias, (out_channels,))

    taps = kh * kw
    if offset.dim() != 4:
        _fail("offset", "(N, 2*G*K, H, W)", _text(offset.shape))
    if aligned:
        height, width = offset.shape[2], offset.shape[3]
        if height < 1 or width < 1:
            _fail("offset", "an output grid of at least one pixel", _text(offset.shape))
    else:
        room_y = first.shape[2] + 2 * padding[0] - dilation[0] * (kh - 1) - 1
        room_x = first.shape[3] + 2 * padding[1] - dilation[1] * (kw - 1) - 1
        if room_y < 0 or room_x < 0:
            expected = f"a kernel that fits the padded input {_text(first.shape)}"
            _fail("weight", expected, _text(weight.shape[hidden:]))
        height, width = room_y // stride[0] + 1, room_x // stride[1] + 1
    if offset.shape[1] < 1 or offset.shape[1] % (2 * taps) != 0:
        _fail("offset", f"a multiple of 2*K = {2 * taps} channels", _text(offset.shape))
    _expect_shape("offset", offset, (batch, offset.shape[1], height, width))
    offset_groups = offset.shape[1] // (2 * taps)
    if channels % offset_groups != 0:
        _fail("offset", f"offset groups that divide the features' {channels} channels", f"{offset_groups} groups")
    _expect_shape("mask", mask, (batch, offset_groups * taps, height, width))
    _expect_shape("level_weight", level_weight, (batch, levels))
    if scales is not None and len(scales) != levels:
        _fail("scales", f"{levels} numbers, one a level", len(scales))
    for level, scale in enumerate(scales or ()):
        if not 0 < scale < float("inf"):
            _fail(f"scales[{level}]", "a positive finite number", f"{scale:g}")


def check_map(name: str, x: Tensor) -> None:
    """Checks a map of the channel-wise operators; the compiled ones make the same checks."""
    if x.dtype not in DTYPES:
        _fail(name, "float64, float32, bfloat16 or float16", x.dtype)
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        _fail(name, "(N, C, H, W) with at least one channel and one pixel", _text(x.shape))


def check_maps(xs: Sequence[Tensor], slopes: Tensor, intercepts: Tensor) -> None:
    """Checks the arguments of `dyhead.ops.channelwise.affine_maximum`; the compiled operator makes the same checks."""
    if len(xs) == 0:
        _fail("xs", "at least one map", "an empty list")
    first = xs[0]
    for i, x in enumerate(xs):
        check_map(f"xs[{i}]", x)
        _expect_like(f"xs[{i}]", x, first.dtype, first)
        _expect_shape(f"xs[{i}]", x, first.shape)
    _expect_shape("slopes", slopes, (first.shape[0], 2, len(xs), first.shape[1]))
    _expect_shape("intercepts", intercepts, (first.shape[0], 2, first.shape[1]))


def check_borders(x: Tensor, boxes: Tensor, pool_size: int) -> None:
    """Checks the arguments of border_align, boxes in the type of positions; the compiled operator does the same."""
    check_map("x", x)
    if x.shape[1] % 4 != 0:
        _fail("x", "a multiple of 4 channels, as many for every border", _text(x.shape))
    _expect_like("boxes", boxes, accumulation_dtype(x.dtype), x)
    if boxes.dim() != 4 or boxes.shape[0] != x.shape[0] or boxes.shape[1] != 4:
        _fail("boxes", f"({x.shape[0]}, 4, H, W)", _text(boxes.shape))
    if not 1 <= pool_size <= 255:
        _fail("pool_size", "an integer from 1 to 255", pool_size)


def check_regions(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Checks the arguments of deform_roi_pool, positions in their type; the compiled operator makes the same checks."""
    check_map("x", x)
    positions = accumulation_dtype(x.dtype)
    _expect_like("rois", rois, positions, x)
    _expect_like("offset", offset, positions, x)
    if rois.dim() != 2 or rois.shape[1] != 5:
        _fail("rois", "(Q, 5)", _text(rois.shape))
    for name, count in (("output_size", output_size), ("sampling_ratio", sampling_ratio)):
        if not 1 <= count <= 255:
            _fail(name, "an integer from 1 to 255", count)
    if not 0 < spatial_scale < math.inf:
        _fail("spatial_scale", "a finite number above 0", f"{spatial_scale:g}")
    if not -math.inf < gamma < math.inf:
        _fail("gamma", "a finite number", f"{gamma:g}")
    _expect_shape("offset", offset, (rois.shape[0], 2, output_size, output_size))


def _fail(argument: str, expected: object, got: object) -> None:
    raise RuntimeError(f"{argument}: expected {expected}, got {got}")


def _text(sizes: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, sizes)) + (",)" if len(sizes) == 1 else ")")


def _expect_like(argument: str, tensor: Tensor | None, dtype: torch.dtype, first: Tensor) -> None:
    if tensor is not None and tensor.dtype != dtype:
        _fail(argument, dtype, tensor.dtype)
    if tensor is not None and tensor.device != first.device:
        _fail(argument, first.device, tensor.device)


def _expect_shape(argument: str, tensor: Tensor | None, expected: Sequence[int]) -> None:
    if tensor is not None and (tensor.dim() != len(expected) or tuple(tensor.shape) != tuple(expected)):
        _fail(argument, _text(expected), _text(tensor.shape))


def _expect_pair(argument: str, pair: Sequence[int], least: int) -> None:
    if len(pair) != 2 or not all(least <= value < 2**31 for value in pair):
        _fail(argument, f"two integers of at least {least}", _text(pair))
