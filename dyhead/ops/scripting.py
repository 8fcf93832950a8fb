"""The public functions in what TorchScript understands, which knows neither keyword-only arguments nor backends.

torch.jit.script takes these in their place (`functional.py`, `border.py`, `regions.py`): it calls the
`__prepare_scriptable__` of what it meets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._jit_internal import BroadcastingList2

from . import library


def in_place_of(function: Callable) -> Callable:
    """What makes torch.jit.script take `function` instead of the public function with the same arguments."""

    def prepare() -> Callable:
        if library.PROBLEM is not None:
            raise RuntimeError(f"torch.jit.script: expected the compiled operator, got none: {library.PROBLEM}")
        return function

    return prepare


def pyramid_deform_conv2d(
    features: list[Tensor],
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    level_weight: Tensor | None = None,
    scales: list[float] | None = None,
    dilation: BroadcastingList2[int] = 1,
) -> Tensor:
    """`dyhead.ops.pyramid_deform_conv2d`."""
    if len(features) > 0:
        offset, like = _widen(offset, features[0]), features[0]
        mask = None if mask is None else _widen(mask, like)
        level_weight = None if level_weight is None else _widen(level_weight, like)
    return torch.ops.dyhead.pyramid_deform_conv2d(
        features, offset, weight, bias, mask, level_weight, True, scales, [1, 1], [0, 0], dilation
    )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """`dyhead.ops.deform_conv2d`."""
    mask = None if mask is None else _widen(mask, input)
    return torch.ops.dyhead.pyramid_deform_conv2d(
        [input],
        _widen(offset, input),
        weight.unsqueeze(0),
        bias,
        mask,
        None,
        False,
        None,
        stride,
        padding,
        dilation,
    )


def border_align(x: Tensor, boxes: Tensor, pool_size: int = 10) -> Tensor:
    """`dyhead.ops.border_align`."""
    return torch.ops.dyhead.border_align(x, _widen(boxes, x).detach(), pool_size)[0]


def deform_roi_pool(
    x: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    gamma: float = 0.1,
    aligned: bool = True,
) -> Tensor:
    """`dyhead.ops.deform_roi_pool`."""
    return torch.ops.dyhead.deform_roi_pool(
        x,
        _widen(rois, x).detach(),
        None if offset is None else _widen(offset, x),
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
        aligned,
    )


def channel_statistics(x: Tensor) -> Tensor:
    """`dyhead.ops.channelwise.channel_statistics`."""
    return torch.ops.dyhead.channel_statistics(x)


def affine_maximum(xs: list[Tensor], slopes: Tensor, intercepts: Tensor) -> Tensor:
    """`dyhead.ops.channelwise.affine_maximum`."""
    dtype = torch.float32 if len(xs) == 0 or xs[0].dtype != torch.float64 else torch.float64
    return torch.ops.dyhead.affine_maximum(xs, slopes.to(dtype), intercepts.to(dtype))


def _widen(tensor: Tensor, like: Tensor) -> Tensor:
    """In the type of positions; what may not be widened is left as it is, for the operator to refuse."""
    if like.dtype == torch.float64 and tensor.is_floating_point():
        return tensor.to(torch.float64)
    if tensor.dtype == torch.float16 or tensor.dtype == torch.bfloat16:
        return tensor.to(torch.float32)
    return tensor
