"""Per-channel maps, to which GroupNorm and the dynamic ReLU of Eq. 5 reduce.

A GroupNorm with known statistics is an affine map of every channel, and so are a level weight and each of the two
branches of the dynamic ReLU; compositions of affine maps are affine. A block therefore needs the statistics of what it
normalises, some arithmetic on (N, C) numbers, and the maximum of two affine maps.

Each compiled operator makes one pass over memory. Where they are not available, the definitions below run.

Shapes: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, library, scripting
from .checks import accumulation_dtype, check_map, check_maps, describe, expect_tensor, is_list


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and population variance of every channel of a map, over its pixels.

    Args:
        x: (N, C, H, W), of any floating type.

    Returns:
        (N, 2, C), mean and variance; float32, or float64 for a float64 map.

    Raises:
        RuntimeError: a wrong shape or type; the message names the argument, what was expected and what came.
    """
    expect_tensor("x", x)
    if _is_compiled_for(x):
        return torch.ops.dyhead.channel_statistics(x)
    return define_channel_statistics(x)


def affine_maximum(xs: Sequence[Tensor], slopes: Tensor, intercepts: Tensor) -> Tensor:
    """The maximum of two affine maps of the inputs, channel by channel.

        out(n, c, i, j) = max_{k=1,2}  intercepts(n, k, c) + sum_b slopes(n, k, b, c) * xs_b(n, c, i, j)

    Args:
        xs: B maps (N, C, H, W) of the same floating type.
        slopes: (N, 2, B, C).
        intercepts: (N, 2, C).

    Returns:
        (N, C, H, W) in the maps' type, in channels_last if xs[0] is. As with `torch.maximum`, NaN in either gives NaN,
        and where both are equal each gets half of the gradient. Sums are float32 (float64 for float64).

    Raises:
        RuntimeError: a wrong shape or type; the message names the argument, what was expected and what came.

    The compiled operator can be differentiated once; `define_affine_maximum` any number of times.
    """
    if isinstance(xs, Tensor) or not is_list(xs):
        raise RuntimeError(f"xs: expected a list of at least one map, got {describe(xs)}")
    for i, x in enumerate(xs):
        expect_tensor(f"xs[{i}]", x)
    expect_tensor("slopes", slopes)
    expect_tensor("intercepts", intercepts)
    if len(xs) > 0 and _is_compiled_for(xs[0]):
        dtype = accumulation_dtype(xs[0].dtype)
        return torch.ops.dyhead.affine_maximum(list(xs), slopes.to(dtype), intercepts.to(dtype))
    return define_affine_maximum(xs, slopes, intercepts)


channel_statistics.__prepare_scriptable__ = scripting.in_place_of(scripting.channel_statistics)
affine_maximum.__prepare_scriptable__ = scripting.in_place_of(scripting.affine_maximum)


def define_channel_statistics(x: Tensor) -> Tensor:
    """`channel_statistics` in plain PyTorch."""
    check_map("x", x)
    variance, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=(2, 3), correction=0)
    return torch.stack([mean, variance], dim=1)


def define_affine_maximum(xs: Sequence[Tensor], slopes: Tensor, intercepts: Tensor) -> Tensor:
    """`affine_maximum` in plain PyTorch."""
    check_maps(xs, slopes, intercepts)
    dtype = accumulation_dtype(xs[0].dtype)
    first, second = intercepts.to(dtype)[..., None, None].unbind(1)
    for b, x in enumerate(xs):
        slope1, slope2 = slopes[:, :, b].to(dtype)[..., None, None].unbind(1)
        first, second = torch.addcmul(first, slope1, x.to(dtype)), torch.addcmul(second, slope2, x.to(dtype))
    return torch.maximum(first, second).to(xs[0].dtype)


def _is_compiled_for(x: Tensor) -> bool:
    return backends.selected() == "compiled" and x.device.type in library.DEVICES
