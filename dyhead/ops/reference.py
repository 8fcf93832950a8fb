"""The operator in plain PyTorch: its definition, the tests' oracle, and the fallback where the library is not built.

    out(n, :, i, j) = bias + sum_l level_weight(n, l) * sum_k  W_{l,k} . F_l(n, :, y_l, x_l) * mask(n, g, k, i, j)

(Dai et al., "Dynamic Head", CVPR 2021, Eq. 4, with the scale-aware weights of Eq. 3 as `level_weight`.) It runs on any
device and floating type and can be differentiated any number of times.

Shapes: N batch, L levels, C channels, K = kh * kw taps, G offset groups, (H, W) the output grid, (H_l, W_l) a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import accumulation_dtype, as_pair, as_scales, check_arguments, describe, expect_tensor, is_list

__all__ = ["deform_conv2d", "pyramid_deform_conv2d"]


class AxisMap(NamedTuple):
    """Where a tap reads along one axis of a level, in pixels of the level: step * i + tap * r + shift * d + origin.

    i is the output pixel, r the row or column of the tap in the kernel, d its offset.
    """

    step: float
    tap: float
    shift: float
    origin: float


def aligned_axis(scale: float, kernel: int, dilation: int) -> AxisMap:
    """The pyramid's geometry: a tap at t on the output grid reads the level at scale * (t + 1/2) - 1/2."""
    return AxisMap(scale, scale * dilation, scale, scale * (0.5 - dilation * (kernel - 1) / 2) - 0.5)


def convolution_axis(stride: int, padding: int, dilation: int) -> AxisMap:
    """The geometry of a convolution, in pixels of its input."""
    return AxisMap(stride, dilation, 1, -padding)


def pyramid_deform_conv2d(
    features: Sequence[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    level_weight: Tensor | None = None,
    *,
    scales: Sequence[float] | None = None,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`dyhead.ops.pyramid_deform_conv2d`, which documents the arguments, in plain PyTorch."""
    raw = raw_arguments(features, offset, weight, bias, mask, level_weight, True, scales, 1, 0, dilation)
    return pyramid_deform_conv(*raw)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """`dyhead.ops.deform_conv2d`, which documents the arguments, in plain PyTorch."""
    return pyramid_deform_conv(*raw_convolution_arguments(input, offset, weight, bias, stride, padding, dilation, mask))


def raw_arguments(
    features: Sequence[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    level_weight: Tensor | None,
    aligned: bool,
    scales: Sequence[float] | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple:
    """Converts the public functions' arguments to those of the raw operator.

    Positions, masks and level weights are converted to the accumulation type, differentiably, so that a half type
    rounds values but never positions.
    """
    if isinstance(features, Tensor) or not is_list(features):
        got = f"one tensor {tuple(features.shape)}" if isinstance(features, Tensor) else describe(features)
        raise RuntimeError(f"features: expected a list of at least one level, got {got}")
    if len(features) == 0:
        raise RuntimeError("features: expected a list of at least one level, got an empty list")
    features = list(features)
    for level, feature in enumerate(features):
        expect_tensor(f"features[{level}]" if aligned else "input", feature)
    expect_tensor("offset", offset)
    expect_tensor("weight", weight)
    expect_tensor("bias", bias, optional=True)
    expect_tensor("mask", mask, optional=True)
    expect_tensor("level_weight", level_weight, optional=True)
    wide = accumulation_dtype(features[0].dtype)
    return (
        features,
        widen("offset", offset, wide),
        weight,
        bias,
        widen("mask", mask, wide),
        widen("level_weight", level_weight, wide),
        aligned,
        as_scales(scales),
        as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
        as_pair("dilation", dilation, 1),
    )


def raw_convolution_arguments(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    mask: Tensor | None,
) -> tuple:
    """Converts the arguments of `deform_conv2d` to those of the raw operator."""
    expect_tensor("weight", weight)
    if weight.dim() != 4:
        raise RuntimeError(f"weight: expected (C_out, C_in/groups, kh, kw), got {tuple(weight.shape)}")
    return raw_arguments([input], offset, weight.unsqueeze(0), bias, mask, None, False, None, stride, padding, dilation)


def autocast_values(
    device: str, features: list[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Casts the values, not the positions, as autocast does. As elsewhere under autocast, float64 is not cast."""
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return [cast(feature) for feature in features], cast(weight), None if bias is None else cast(bias)


def widen(name: str, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype == dtype:
        return tensor
    if not tensor.is_floating_point() or tensor.element_size() > dtype.itemsize:
        raise RuntimeError(f"{name}: expected {dtype} or a narrower floating type, got {tensor.dtype}")
    return tensor.to(dtype)


def pyramid_deform_conv(
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
) -> Tensor:
    """The raw operator `dyhead::pyramid_deform_conv2d` in plain PyTorch."""
    check_arguments(features, offset, weight, bias, mask, level_weight, aligned, scales, stride, padding, dilation)
    dtype, wide = features[0].dtype, accumulation_dtype(features[0].dtype)
    channels = features[0].shape[1]
    _, out_channels, group_channels, kh, kw = weight.shape
    batch, _, height, width = offset.shape
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * kh * kw)
    shift = offset.reshape(batch, offset_groups, kh, kw, 2, height, width)
    factor = None if mask is None else mask.reshape(batch, offset_groups, 1, kh, kw, height, width)

    out = None
    for level, feature in enumerate(features):
        if aligned:
            scale = feature.shape[2] / height if scales is None else scales[level]
            rows, columns = aligned_axis(scale, kh, dilation[0]), aligned_axis(scale, kw, dilation[1])
        else:
            rows = convolution_axis(stride[0], padding[0], dilation[0])
            columns = convolution_axis(stride[1], padding[1], dilation[1])
        y = _grid(rows, kh, height, shift).view(kh, 1, height, 1) + rows.shift * shift[:, :, :, :, 0]
        x = _grid(columns, kw, width, shift).view(1, kw, 1, width) + columns.shift * shift[:, :, :, :, 1]
        samples = sample_bilinear(feature.to(wide), y, x)  # (N, G, C/G, kh, kw, H, W)
        if factor is not None:
            samples = samples * factor
        if level_weight is not None:
            samples = samples * level_weight[:, level].view(batch, 1, 1, 1, 1, 1, 1)
        samples = samples.reshape(batch, groups, group_channels * kh * kw, height * width)
        kernel = weight[level].to(wide).reshape(groups, out_channels // groups, group_channels * kh * kw)
        product = kernel @ samples
        out = product if out is None else out + product

    out = out.reshape(batch, out_channels, height, width)
    if bias is not None:
        out = out + bias.to(wide).view(1, out_channels, 1, 1)
    return out.to(dtype)


def _grid(axis: AxisMap, kernel: int, size: int, like: Tensor) -> Tensor:
    """Positions (kernel, size) without offsets; computed in float64 and rounded once."""
    tap = torch.arange(kernel, dtype=torch.float64, device=like.device).view(kernel, 1)
    pixel = torch.arange(size, dtype=torch.float64, device=like.device)
    return (axis.step * pixel + axis.tap * tap + axis.origin).to(like.dtype)


def sample_bilinear(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """feature (N, C, H_l, W_l) at positions (N, G, kh, kw, H, W) as (N, G, C/G, kh, kw, H, W); 0 outside the map."""
    batch, channels, height, width = feature.shape
    offset_groups = y.shape[1]
    # Every comparison is false for a NaN. Outside positions move to 0, so that no arithmetic ever sees them, forward or
    # backward, and their samples are taken out below.
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    flat = feature.reshape(batch * offset_groups, channels // offset_groups, height * width)
    samples = y.shape[2:].numel()

    def corner(row: Tensor, column: Tensor, share: Tensor) -> Tensor:
        counts = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = torch.where(counts, row.to(torch.int64) * width + column.to(torch.int64), 0)
        index = index.reshape(batch * offset_groups, 1, samples).expand(-1, flat.shape[1], -1)
        value = flat.gather(2, index).view(batch, offset_groups, flat.shape[1], *y.shape[2:])
        # A product with 0 would not do: the value read in place of an outside corner may be infinite.
        return torch.where(counts.unsqueeze(2), value, 0) * share.unsqueeze(2)

    down, right = y - top, x - left
    return (
        corner(top, left, (1 - down) * (1 - right))
        + corner(top, left + 1, (1 - down) * right)
        + corner(top + 1, left, down * (1 - right))
        + corner(top + 1, left + 1, down * right)
    )
