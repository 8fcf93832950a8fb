"""What PyTorch is told about the compiled operator: shapes without data, gradients, autocast and flops."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import accumulation_dtype, check_arguments
from .reference import autocast_values

FORWARD, BACKWARD = "dyhead::pyramid_deform_conv2d", "dyhead::_pyramid_deform_conv2d_backward"
_library = torch.library.Library("dyhead", "FRAGMENT")


def _memory_format(like: Tensor) -> torch.memory_format:
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake(FORWARD)
def _fake(features, offset, mask, weight, bias, level_weight, *geometry):
    check_arguments(features, offset, mask, weight, bias, level_weight, *geometry)
    first = features[0]
    size = (first.shape[0], weight.shape[1], offset.shape[2], offset.shape[3])
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=_memory_format(first))


@torch.library.register_fake(BACKWARD)
def _backward_fake(grad, features, offset, mask, weight, bias, level_weight, *geometry_and_needs):
    *geometry, needs = geometry_and_needs
    check_arguments(features, offset, mask, weight, bias, level_weight, *geometry)
    first = features[0]

    def empty(needed, like):
        return torch.empty(like.shape if needed and like is not None else (0,), dtype=dtype, device=first.device)

    dtype = first.dtype
    weight_grad, bias_grad = empty(needs[3], weight), empty(needs[4], bias)
    dtype = accumulation_dtype(first.dtype)
    offset_grad, mask_grad, level_grad = empty(needs[1], offset), empty(needs[2], mask), empty(needs[5], level_weight)
    feature_grads = [
        torch.empty(f.shape, dtype=f.dtype, device=f.device, memory_format=_memory_format(f))
        for f in (features if needs[0] else [])
    ]
    return feature_grads, offset_grad, mask_grad, weight_grad, bias_grad, level_grad


def _save(ctx, inputs, output):
    features, *tensors = inputs[:6]
    ctx.levels, ctx.geometry = len(features), inputs[6:]
    ctx.save_for_backward(*features, *tensors)


def _differentiate(ctx, grad):
    saved = ctx.saved_tensors
    features, tensors = list(saved[: ctx.levels]), saved[ctx.levels :]
    needs = [any(ctx.needs_input_grad[0]), *ctx.needs_input_grad[1:6]]
    grads = torch.ops.dyhead._pyramid_deform_conv2d_backward(grad, features, *tensors, *ctx.geometry, needs)
    returned = [grad if needed else None for grad, needed in zip(grads[1:], needs[1:], strict=True)]
    return (grads[0] if needs[0] else [None] * ctx.levels, *returned, *[None] * len(ctx.geometry))


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "dyhead's compiled operator has no second derivatives: expected the functions of dyhead.ops.reference, which "
        "have, where gradients are differentiated again"
    )


torch.library.register_autograd(BACKWARD, _no_second_derivative)


def _register_autocast(device: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(features, offset, mask, weight, bias, level_weight, *geometry):
        features, weight, bias = autocast_values(device, features, weight, bias)
        # Not `torch.autocast(enabled=False)`: this leaves other operators' autocast state alone.
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.dyhead.pyramid_deform_conv2d(features, offset, mask, weight, bias, level_weight, *geometry)

    _library.impl("pyramid_deform_conv2d", cast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


@register_flop_formula(torch.ops.dyhead.pyramid_deform_conv2d)
def _flops(features, offset, mask, weight, *others, **unused) -> int:
    """Two per multiply-add of the weights; sampling is not counted."""
    return 2 * prod(weight) * offset[0] * offset[2] * offset[3]


@register_flop_formula(torch.ops.dyhead._pyramid_deform_conv2d_backward)
def _backward_flops(grad, features, offset, mask, weight, *others, **unused) -> int:
    needs_features, needs_offset, needs_mask, needs_weight, _, needs_level_weight = others[-1]
    samples = needs_features or needs_offset or needs_mask or needs_level_weight
    return (bool(samples) + bool(needs_weight)) * _flops(features, offset, mask, weight)
