"""Maps channel by channel, what GroupNorm and the dynamic ReLU of Eq. 5 come down to.

A GroupNorm whose statistics are known is an affine map of every channel, and so are a weight of a level and each of the
two branches of the dynamic ReLU; affine maps of affine maps are affine. So a block needs the statistics of what it
normalises, some arithmetic on (N, C) numbers, and the maximum of two affine maps.

The compiled operators make one pass over memory each. Where they do not run, the definitions below do.

Shapes: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, library
from .checks import accumulation_dtype, check_maps


def channel_statistics(x: Tensor) -> Tensor:
    """Mean and variance (that of the population) of every channel of a map, over its pixels.

    Args:
        x: (N, C, H, W), of any floating type.

    Returns:
        (N, 2, C), mean and variance; float32, or float64 for a float64 map.
    """
    if _is_compiled_for(x):
        return torch.ops.dyhead.channel_statistics(x)
    return define_channel_statistics(x)


def affine_maximum(xs: Sequence[Tensor], slopes: Tensor, intercepts: Tensor) -> Tensor:
    """The larger one of two affine maps of some maps, channel by channel.

        out(n, c, i, j) = max_{k=1,2}  intercepts(n, k, c) + sum_b slopes(n, k, b, c) * xs_b(n, c, i, j)

    Args:
        xs: B maps (N, C, H, W) of one floating type.
        slopes: (N, 2, B, C).
        intercepts: (N, 2, C).

    Returns:
        (N, C, H, W) in the maps' type, with channels last in memory if xs[0] has. As with `torch.maximum`, NaN in
        either is NaN, and where both are equal each has half of the gradient. Sums are float32 (float64 for float64).

    Raises:
        RuntimeError: a shape or type does not fit; the text names the argument, what was expected and what came.

    The compiled operator can be differentiated once; `define_affine_maximum` any number of times.
    """
    if xs and _is_compiled_for(xs[0]):
        dtype = accumulation_dtype(xs[0].dtype)
        return torch.ops.dyhead.affine_maximum(list(xs), slopes.to(dtype), intercepts.to(dtype))
    return define_affine_maximum(xs, slopes, intercepts)


def define_channel_statistics(x: Tensor) -> Tensor:
    """`channel_statistics` in plain PyTorch."""
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
