"""Multiply-adds of the operators, for PyTorch's FLOP counter and for fvcore's.

Of a deformable convolution the products with its weights are counted, as of a dense convolution, and not the sampling;
of a channelwise operator each sum and product of every pixel; of border alignment and deformable RoI pooling the four
products of each sample.
Importing `dyhead.ops` registers them with `torch.utils.flop_counter`, which counts two for a multiply-add; fvcore,
which counts one, takes `flop_handlers()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

Shape = Sequence[int]


def deform_conv(weight: Shape, offset: Shape) -> int:
    """Of a weight (L, C_out, C_in/groups, kh, kw) at the output pixels of an offset (N, 2*G*K, H, W)."""
    return prod(weight) * offset[0] * offset[2] * offset[3]


def deform_conv_backward(weight: Shape, offset: Shape, samples: bool, weights: bool) -> int:
    """Of the gradients of the samples, whichever of features, positions and masks they are for, and of the weight."""
    return (samples + weights) * deform_conv(weight, offset)


def channel_statistics(x: Shape) -> int:
    """Of a map (N, C, H, W): its sum and that of its squares."""
    return 2 * prod(x)


def affine_maximum(slopes: Shape, out: Shape) -> int:
    """Of slopes (N, 2, B, C) and a result (N, C, H, W): two maps of B inputs."""
    return 2 * slopes[2] * prod(out)


def affine_maximum_backward(slopes: Shape, grad: Shape) -> int:
    """Both maps again, which tell the larger; of it the gradients of B inputs, B slopes and an intercept."""
    return affine_maximum(slopes, grad) + (2 * slopes[2] + 1) * prod(grad)


def border_align(out: Shape, pool_size: int) -> int:
    """Of a result (N, 4*C, H, W): the largest of ``pool_size`` + 1 samples each."""
    return 4 * (pool_size + 1) * prod(out)


def border_align_backward(out: Shape) -> int:
    """To the four pixels of the one sample that each number of a result (N, 4*C, H, W) is."""
    return 4 * prod(out)


def deform_roi_pool(out: Shape, sampling_ratio: int) -> int:
    """Of a result (Q, C, S, S): the mean of ``sampling_ratio`` squared samples each."""
    return 4 * sampling_ratio**2 * prod(out)


def deform_roi_pool_backward(out: Shape, sampling_ratio: int, x: bool, offset: bool) -> int:
    """To the four pixels of each sample for the gradient of ``x``, and with them for that of ``offset``."""
    return (x + offset) * deform_roi_pool(out, sampling_ratio)


def flop_handlers() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """What `set_op_handle` of fvcore's FlopCountAnalysis, and of Detectron2's, takes to count the operators.

    Importing `dyhead.detectron2` makes it the default of both. Neither counts gradients.

    Example:
        >>> analysis = FlopCountAnalysis(model, inputs).set_op_handle(**flop_handlers())  # doctest: +SKIP
    """

    def shape(value: Any) -> Shape:
        return value.type().sizes()

    def of_borders(inputs: list[Any], outputs: list[Any]) -> int:
        return border_align(shape(outputs[0]), inputs[2].toIValue())

    def of_regions(inputs: list[Any], outputs: list[Any]) -> int:
        return deform_roi_pool(shape(outputs[0]), inputs[5].toIValue())

    return {
        "dyhead::pyramid_deform_conv2d": lambda inputs, outputs: deform_conv(shape(inputs[2]), shape(inputs[1])),
        "dyhead::border_align": of_borders,
        "dyhead::deform_roi_pool": of_regions,
        "dyhead::channel_statistics": lambda inputs, outputs: channel_statistics(shape(inputs[0])),
        "dyhead::affine_maximum": lambda inputs, outputs: affine_maximum(shape(inputs[1]), shape(outputs[0])),
    }


def register_with_fvcore() -> None:
    """Makes `flop_handlers` the default of every FlopCountAnalysis to come, so far as fvcore has defaults."""
    module = importlib.import_module("fvcore.nn.flop_count")  # fvcore.nn.flop_count is a function
    getattr(module, "_DEFAULT_SUPPORTED_OPS", {}).update(flop_handlers())
