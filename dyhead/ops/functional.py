"""The public functions: one per geometry, both on the operator torch.ops.dyhead.pyramid_deform_conv2d.

Shapes: N batch, L levels, C channels, K = kh * kw taps, G offset groups, (H, W) the output grid, (H_l, W_l) a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, library, onnx, reference, scripting

if library.PROBLEM is None:
    from . import registration  # noqa: F401

# Looked up here because torch.compile of PyTorch 2.11 cannot.
AUTOCAST_DEVICES = [device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)]


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
    """Deformable convolution over the levels of a pyramid, summed: Eq. 4 of the Dynamic Head paper (arXiv 2106.08322).

        out(n, :, i, j) = bias + sum_l level_weight(n, l) * sum_k  W_{l,k} . F_l(n, :, y_l, x_l) * mask(n, g, k, i, j)

    Every level is read at the same position of the image, and nothing is resized. Tap (r, s) of output
    pixel (i, j) is at t = i + dilation * (r - (kh - 1) / 2) + dy on the output grid and reads level l at
    y_l = scale_l * (t + 1/2) - 1/2; x alike. F_l(y, x) is bilinear, and 0 outside the map.

    Args:
        features: L maps (N, C_in, H_l, W_l). One dtype: float64, float32, bfloat16 or float16.
        offset: (N, 2*G*K, H, W), in pixels of the output grid; dy and dx of a tap are adjacent, taps row by row.
            (H, W) is the size of the output. The features' channels are split into G groups with separate offsets.
        weight: (L, C_out, C_in/groups, kh, kw), of the features' dtype.
        bias: (C_out,), of the features' dtype.
        mask: (N, G*K, H, W), the weight of every sample.
        level_weight: (N, L), the weight of every level: the scale-aware attention of Eq. 3, with the 1/L of Eq. 4.
        scales: L numbers, the stride of the output grid over the stride of each level: 2 for the next finer level,
            1/2 for the next coarser one. Default: H_l / H.
        dilation: distance between taps, in pixels of the output grid; an int or (vertical, horizontal).

    Returns:
        (N, C_out, H, W) in the features' dtype, in channels_last if features[0] is.

    Offset, mask and level_weight may be of any floating type no wider than float32 (float64 with float64 features).
    Positions and sums are float32 (float64 for float64). Half types round the values that are read and written and, for
    bfloat16 on a processor with AVX512-BF16, every sample before it is multiplied by weights or gradients; subnormal
    values then count as 0 in products. A CUDA device rounds samples of both half types, and rounds float32 samples,
    weights and gradients to TF32 where PyTorch's convolutions may. An offset may have any value: NaN, infinite and
    far-away positions read 0 and have a zero gradient. The result and all gradients do not depend on the number of
    threads; on a CUDA device the features' gradient is summed in an unspecified order, unless
    `torch.use_deterministic_algorithms` is set, which takes more memory and rounds samples' gradients to bfloat16 where
    the features are. Autocast casts features, weight and bias to its type.

    Every tensor has first derivatives in reverse mode; `torch.func.vmap` makes its dimension a part of the batch, or
    loops over it where weight or bias have it. In forward mode, and for derivatives of derivatives by torch.func, plain
    PyTorch runs, which is slower. For second derivatives by torch.autograd use `dyhead.ops.reference` or
    `dyhead.ops.backend("reference")`, as the error says.

    torch.jit.script takes this function (`scales` as floats, products in full float32 on a CUDA device).
    torch.onnx.export writes it as ONNX's DeformConv, one a level, from opset 19 on (`dyhead.ops.onnx`); with
    dynamo=False its definition in plain PyTorch.

    Raises:
        RuntimeError: a wrong type, number, shape, dtype or device; the message names the argument, what was expected
            and what came. Integers may be NumPy's, or tensors without dimensions; bools and floats are none.
    """
    return _run(
        *reference.raw_arguments(features, offset, weight, bias, mask, level_weight, True, scales, 1, 0, dilation)
    )


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
    """Modulated deformable convolution (arXiv 1811.11168) with the signature of `torchvision.ops.deform_conv2d`.

    Args:
        input: (N, C_in, H_in, W_in); float64, float32, bfloat16 or float16.
        offset: (N, 2*G*K, H, W), in pixels of the input; dy and dx of a tap are adjacent, taps row by row.
        weight: (C_out, C_in/groups, kh, kw), of the input's dtype.
        bias: (C_out,), of the input's dtype.
        stride, padding, dilation: in pixels of the input; an int or (vertical, horizontal), no text such as "same".
        mask: (N, G*K, H, W), the weight of every sample.

    Returns:
        (N, C_out, H, W) in the input's dtype, where H = (H_in + 2*padding - dilation*(kh-1) - 1) // stride + 1.

    Types, offsets, autocast, gradients and errors are as for `pyramid_deform_conv2d`.
    """
    return _run(*reference.raw_convolution_arguments(input, offset, weight, bias, stride, padding, dilation, mask))


pyramid_deform_conv2d.__prepare_scriptable__ = scripting.in_place_of(scripting.pyramid_deform_conv2d)
deform_conv2d.__prepare_scriptable__ = scripting.in_place_of(scripting.deform_conv2d)


def _run(features: list[Tensor], offset: Tensor, *others) -> Tensor:
    if onnx.exporting():
        return onnx.deform_conv(features, offset, *others)
    if backends.selected() == "compiled" and library.runs_on(features[0].device):
        return torch.ops.dyhead.pyramid_deform_conv2d(features, offset, *others, _allow_tf32(features[0]))
    return _run_reference(features, offset, *others)


def _allow_tf32(feature: Tensor) -> bool:
    """Whether float32 products may be rounded to TF32 on a CUDA device: as PyTorch's convolutions may."""
    if feature.device.type != "cuda":
        return False
    if torch.compiler.is_compiling():
        return torch.backends.cudnn.allow_tf32  # the compiler cannot look into the newer setting
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _run_reference(features, offset, weight, bias, mask, level_weight, *geometry) -> Tensor:
    device = features[0].device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return reference.pyramid_deform_conv(features, offset, weight, bias, mask, level_weight, *geometry)
    features, weight, bias = reference.autocast_values(device, features, weight, bias)
    with torch.autocast(device, enabled=False):
        return reference.pyramid_deform_conv(features, offset, weight, bias, mask, level_weight, *geometry)
