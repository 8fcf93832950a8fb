"""Registers the compiled operators' fake implementations, derivatives, vmap and autocast rules, and FLOP counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import flops
from .border import define_border_align
from .channelwise import define_affine_maximum, define_channel_statistics
from .checks import accumulation_dtype, check_arguments, check_borders, check_map, check_maps, check_regions
from .reference import autocast_values, pyramid_deform_conv
from .regions import define_deform_roi_pool
from .transforms import refuse_second_derivative, register_derivative, register_folded, register_loop

FORWARD, BACKWARD = "dyhead::pyramid_deform_conv2d", "dyhead::_pyramid_deform_conv2d_backward"
# Arguments that say where taps read: aligned, scales, stride, padding, dilation. Settings follow them.
GEOMETRY = 5
# Those of deform_roi_pool after its tensors.
REGION_NUMBERS = 5
_library = torch.library.Library("dyhead", "FRAGMENT")


def _memory_format(like: Tensor) -> torch.memory_format:
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.register_fake(FORWARD)
def _fake(features, offset, weight, bias, mask, level_weight, *geometry, allow_tf32=False):
    check_arguments(features, offset, weight, bias, mask, level_weight, *geometry[:GEOMETRY])
    first = features[0]
    size = (first.shape[0], weight.shape[1], offset.shape[2], offset.shape[3])
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=_memory_format(first))


@torch.library.register_fake(BACKWARD)
def _backward_fake(grad, features, offset, weight, bias, mask, level_weight, *others, **settings):
    needs = others[GEOMETRY]
    check_arguments(features, offset, weight, bias, mask, level_weight, *others[:GEOMETRY])
    first = features[0]

    positions = accumulation_dtype(first.dtype)

    def empty(needed, like, dtype):
        return torch.empty(like.shape if needed and like is not None else (0,), dtype=dtype, device=first.device)

    return (
        [_empty_like(feature) for feature in (features if needs[0] else [])],
        empty(needs[1], offset, positions),
        empty(needs[2], weight, first.dtype),
        empty(needs[3], bias, first.dtype),
        empty(needs[4], mask, positions),
        empty(needs[5], level_weight, positions),
    )


def _save(ctx, arguments, result):
    features, *tensors = arguments[:6]
    ctx.levels, ctx.geometry = len(features), arguments[6 : 6 + GEOMETRY]
    # The dispatcher leaves out settings that have their defaults.
    ctx.allow_tf32 = any(arguments[6 + GEOMETRY :])
    ctx.save_for_backward(*features, *tensors)


def _differentiate(ctx, needs, grad):
    saved = ctx.saved_tensors
    features, tensors = list(saved[: ctx.levels]), saved[ctx.levels :]
    needs = [any(needs[0]), *needs[1:6]]
    settings = (ctx.allow_tf32, torch.are_deterministic_algorithms_enabled())
    grads = torch.ops.dyhead._pyramid_deform_conv2d_backward(grad, features, *tensors, *ctx.geometry, needs, *settings)
    returned = [grad if needed else None for grad, needed in zip(grads[1:], needs[1:], strict=True)]
    return (grads[0] if needs[0] else [None] * ctx.levels, *returned)


def _save_nothing(ctx, arguments, result):
    pass


def _define(features, offset, weight, bias, mask, level_weight, *others):
    return pyramid_deform_conv(features, offset, weight, bias, mask, level_weight, *others[:GEOMETRY])


register_derivative(_library, "pyramid_deform_conv2d", _save, _differentiate, _define)
register_derivative(_library, "_pyramid_deform_conv2d_backward", _save_nothing, refuse_second_derivative, None)
register_folded("pyramid_deform_conv2d", unfolded=(2, 3))  # weight and bias
register_loop("_pyramid_deform_conv2d_backward")


def _register_autocast(device: str, key: str) -> None:
    def cast(features, offset, weight, bias, *others):
        features, weight, bias = autocast_values(device, features, weight, bias)
        with torch.autocast(device, enabled=False):
            return torch.ops.dyhead.pyramid_deform_conv2d(features, offset, weight, bias, *others)

    _library.impl("pyramid_deform_conv2d", cast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


@register_flop_formula(torch.ops.dyhead.pyramid_deform_conv2d)
def _flops(features, offset, weight, *others, **unused) -> int:
    return 2 * flops.deform_conv(weight, offset)


@register_flop_formula(torch.ops.dyhead._pyramid_deform_conv2d_backward)
def _backward_flops(grad, features, offset, weight, bias, mask, level_weight, *others, **unused) -> int:
    needs_features, needs_offset, needs_weight, _, needs_mask, needs_level_weight = others[GEOMETRY]
    samples = needs_features or needs_offset or needs_mask or needs_level_weight
    return 2 * flops.deform_conv_backward(weight, offset, samples, needs_weight)


STATISTICS, MAXIMUM, MAXIMUM_BACKWARD = (
    f"dyhead::{name}" for name in ("channel_statistics", "affine_maximum", "_affine_maximum_backward")
)


@torch.library.register_fake(STATISTICS)
def _statistics_fake(x):
    check_map("x", x)
    return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake(MAXIMUM)
def _maximum_fake(xs, slopes, intercepts):
    check_maps(xs, slopes, intercepts)
    return _empty_like(xs[0])


@torch.library.register_fake(MAXIMUM_BACKWARD)
def _maximum_backward_fake(grad, xs, slopes, intercepts):
    check_maps(xs, slopes, intercepts)
    return [_empty_like(x) for x in xs], slopes.new_empty(slopes.shape), intercepts.new_empty(intercepts.shape)


def _save_map(ctx, arguments, result):
    ctx.save_for_backward(arguments[0], result)


def _differentiate_statistics(ctx, needs, grad):
    x, statistics = ctx.saved_tensors
    mean_grad, variance_grad = (grad / (x.shape[2] * x.shape[3]))[..., None, None].unbind(1)
    slope = 2 * variance_grad
    intercept = mean_grad - slope * statistics[:, 0, :, None, None]
    # Rounded after the sum only: its terms cancel where the mean is large.
    return torch.addcmul(intercept, slope, x.to(slope.dtype)).to(x.dtype)


def _save_maps(ctx, arguments, result):
    xs, slopes, intercepts = arguments
    ctx.save_for_backward(*xs, slopes, intercepts)


def _differentiate_maximum(ctx, needs, grad):
    *xs, slopes, intercepts = ctx.saved_tensors
    return torch.ops.dyhead._affine_maximum_backward(grad, xs, slopes, intercepts)


register_derivative(_library, "channel_statistics", _save_map, _differentiate_statistics, define_channel_statistics)
register_derivative(_library, "affine_maximum", _save_maps, _differentiate_maximum, define_affine_maximum)
register_derivative(_library, "_affine_maximum_backward", _save_nothing, refuse_second_derivative, None)
for _name in ("channel_statistics", "affine_maximum", "_affine_maximum_backward"):
    register_folded(_name)


@register_flop_formula(torch.ops.dyhead.channel_statistics)
def _statistics_flops(x, **unused) -> int:
    return 2 * flops.channel_statistics(x)


@register_flop_formula(torch.ops.dyhead.affine_maximum)
def _maximum_flops(xs, slopes, intercepts, **unused) -> int:
    return 2 * flops.affine_maximum(slopes, xs[0])


@register_flop_formula(torch.ops.dyhead._affine_maximum_backward)
def _maximum_backward_flops(grad, xs, slopes, intercepts, **unused) -> int:
    return 2 * flops.affine_maximum_backward(slopes, grad)


@torch.library.register_fake("dyhead::border_align")
def _border_fake(x, boxes, pool_size):
    check_borders(x, boxes, pool_size)
    size = (*x.shape[:2], *boxes.shape[2:])
    values = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    return values, torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("dyhead::_border_align_backward")
def _border_backward_fake(grad, x, boxes, index, pool_size, deterministic=False):
    check_borders(x, boxes, pool_size)
    return _empty_like(x)


def _save_border(ctx, arguments, result):
    x, boxes, ctx.pool_size = arguments
    ctx.set_materialize_grads(False)  # of the points' numbers: they have none
    ctx.save_for_backward(x, boxes, result[1])


def _differentiate_border(ctx, needs, grad, _):
    if grad is None or not needs[0]:
        return None
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.dyhead._border_align_backward(grad, *ctx.saved_tensors, ctx.pool_size, deterministic)


register_derivative(_library, "border_align", _save_border, _differentiate_border, define_border_align)
register_derivative(_library, "_border_align_backward", _save_nothing, refuse_second_derivative, None)
for _name in ("border_align", "_border_align_backward"):
    register_folded(_name)


@register_flop_formula(torch.ops.dyhead.border_align)
def _border_flops(x, boxes, pool_size, **unused) -> int:
    return 2 * flops.border_align((*x[:2], *boxes[2:]), pool_size)


@register_flop_formula(torch.ops.dyhead._border_align_backward)
def _border_backward_flops(grad, *unused, **unused_too) -> int:
    return 2 * flops.border_align_backward(grad)


@torch.library.register_fake("dyhead::deform_roi_pool")
def _regions_fake(x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, aligned):
    check_regions(x, rois, offset, output_size, spatial_scale, sampling_ratio, gamma)
    size = (rois.shape[0], x.shape[1], output_size, output_size)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.register_fake("dyhead::_deform_roi_pool_backward")
def _regions_backward_fake(grad, x, rois, offset, *others, deterministic=False):
    numbers, needs = others[:REGION_NUMBERS], others[REGION_NUMBERS]
    check_regions(x, rois, offset, *numbers[:4])
    return (
        _empty_like(x) if needs[0] else x.new_empty(0),
        rois.new_empty(offset.shape if needs[1] and offset is not None else (0,)),
    )


def _save_regions(ctx, arguments, result):
    ctx.numbers = arguments[3:]
    ctx.save_for_backward(*arguments[:3])


def _differentiate_regions(ctx, needs, grad):
    needs = [needs[0], needs[2]]
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = torch.ops.dyhead._deform_roi_pool_backward(grad, *ctx.saved_tensors, *ctx.numbers, needs, deterministic)
    x_grad, offset_grad = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return x_grad, None, offset_grad


register_derivative(_library, "deform_roi_pool", _save_regions, _differentiate_regions, define_deform_roi_pool)
register_derivative(_library, "_deform_roi_pool_backward", _save_nothing, refuse_second_derivative, None)
for _name in ("deform_roi_pool", "_deform_roi_pool_backward"):
    register_loop(_name)


@register_flop_formula(torch.ops.dyhead.deform_roi_pool)
def _regions_flops(x, rois, offset, output_size, spatial_scale, sampling_ratio, *others, **unused) -> int:
    return 2 * flops.deform_roi_pool((rois[0], x[1], output_size, output_size), sampling_ratio)


@register_flop_formula(torch.ops.dyhead._deform_roi_pool_backward)
def _regions_backward_flops(grad, x, rois, offset, *others, **unused) -> int:
    return 2 * flops.deform_roi_pool_backward(grad, others[2], *others[REGION_NUMBERS])
