"""Maps channel by channel, what GroupNorm and the dynamic ReLU of Eq. 5 come down to, in one pass over memory each.

A GroupNorm whose statistics are known is an affine map of every channel, and so are a weight of a level and each of the
two branches of the dynamic ReLU; affine maps of affine maps are affine. So a block needs the statistics of what it
normalises, some arithmetic on (N, C) numbers, and the maximum of two affine maps.

Where the compiled operators do not run, the definitions below do. Shapes: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .checks import accumulation_dtype

STATISTICS, MAXIMUM, MAXIMUM_BACKWARD = (
    f"dyhead::{name}" for name in ("channel_statistics", "affine_maximum", "_affine_maximum_backward")
)


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
    """
    if _is_compiled_for(xs[0]):
        dtype = accumulation_dtype(xs[0].dtype)
        return torch.ops.dyhead.affine_maximum(list(xs), slopes.to(dtype), intercepts.to(dtype))
    return define_affine_maximum(xs, slopes, intercepts)


def define_channel_statistics(x: Tensor) -> Tensor:
    """`channel_statistics` in plain PyTorch."""
    variance, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=(2, 3), correction=0)
    return torch.stack([mean, variance], dim=1)


def define_affine_maximum(xs: Sequence[Tensor], slopes: Tensor, intercepts: Tensor) -> Tensor:
    """`affine_maximum` in plain PyTorch."""
    dtype = accumulation_dtype(xs[0].dtype)
    first, second = intercepts.to(dtype)[..., None, None].unbind(1)
    for b, x in enumerate(xs):
        slope1, slope2 = slopes[:, :, b].to(dtype)[..., None, None].unbind(1)
        first, second = torch.addcmul(first, slope1, x.to(dtype)), torch.addcmul(second, slope2, x.to(dtype))
    return torch.maximum(first, second).to(xs[0].dtype)


def _is_compiled_for(x: Tensor) -> bool:
    return x.device.type in library.DEVICES


def _register() -> None:
    """Tells PyTorch the compiled operators' shapes and gradients."""

    def like(x: Tensor) -> Tensor:
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)

    @torch.library.register_fake(STATISTICS)
    def _(x):
        return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=accumulation_dtype(x.dtype))

    @torch.library.register_fake(MAXIMUM)
    def _(xs, slopes, intercepts):
        return like(xs[0])

    @torch.library.register_fake(MAXIMUM_BACKWARD)
    def _(grad, xs, slopes, intercepts):
        return [like(x) for x in xs], slopes.new_empty(slopes.shape), intercepts.new_empty(intercepts.shape)

    def save_map(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    def differentiate_statistics(ctx, grad):
        x, statistics = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        mean_grad, variance_grad = (grad / pixels).unbind(1)
        slope = 2 * variance_grad
        intercept = mean_grad - slope * statistics[:, 0]
        slope, intercept = (value[..., None, None].to(x.dtype) for value in (slope, intercept))
        return torch.addcmul(intercept, slope, x)

    def save_maps(ctx, inputs, output):
        xs, slopes, intercepts = inputs
        ctx.save_for_backward(*xs, slopes, intercepts)

    def differentiate_maximum(ctx, grad):
        *xs, slopes, intercepts = ctx.saved_tensors
        return torch.ops.dyhead._affine_maximum_backward(grad, xs, slopes, intercepts)

    def no_second_derivative(ctx, *grads):
        raise RuntimeError(
            "dyhead's compiled affine_maximum has no second derivatives: expected "
            "dyhead.ops.channelwise.define_affine_maximum, which has, where gradients are differentiated again"
        )

    torch.library.register_autograd(STATISTICS, differentiate_statistics, setup_context=save_map)
    torch.library.register_autograd(MAXIMUM, differentiate_maximum, setup_context=save_maps)
    torch.library.register_autograd(MAXIMUM_BACKWARD, no_second_derivative)


if library.PROBLEM is None:
    _register()
