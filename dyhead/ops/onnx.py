"""The operators in ONNX: Eq. 4 as its standard operator DeformConv (opset 19), the others as they are defined.

`torch.onnx.export(..., dynamo=True)` finds them without being told: under it the public functions run what is here, and
where an exported program already has the compiled operators, tracing them leads here.

A level is one DeformConv and outputs are added. It reads tap (r, s) of output pixel (i, j) at

    stride * i + dilation * r - pad + offset

in pixels of the level, with whole strides and dilations. What the geometry asks for (`reference.AxisMap`) is had by
whole numbers near it and offsets that make up for the rest: exactly, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn import functional as F

from . import library
from .border import define_border_align
from .channelwise import define_affine_maximum, define_channel_statistics
from .checks import accumulation_dtype, check_arguments
from .reference import AxisMap, aligned_axis, convolution_axis, pyramid_deform_conv
from .regions import define_deform_roi_pool


def exporting() -> bool:
    """Whether code is traced for `torch.onnx.export` with dynamo=True; its older exporter is jit's tracing."""
    return torch.onnx.is_in_onnx_export() and not torch.jit.is_tracing()


def deform_conv(
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
    allow_tf32: bool = False,
) -> Tensor:
    """The raw operator `dyhead::pyramid_deform_conv2d` as DeformConv, where ONNX is exported.

    Positions that are no numbers are read as the runtime reads them.
    """
    arguments = features, offset, weight, bias, mask, level_weight, aligned, scales, stride, padding, dilation
    sizes = [side for tensor in (offset, *features) for side in tensor.shape[2:]]
    if aligned and scales is None and not all(isinstance(side, int) for side in sizes):
        # The stride of DeformConv is a constant, and the ratio of two sizes that are not known yet is none: by its
        # definition.
        return pyramid_deform_conv(*arguments)
    check_arguments(*arguments)
    dtype, wide = features[0].dtype, accumulation_dtype(features[0].dtype)
    (group_channels, kh, kw), (height, width) = weight.shape[2:], offset.shape[2:]
    out = None
    for level, feature in enumerate(features):
        if aligned:
            scale = feature.shape[2] / height if scales is None else scales[level]
            axes = [aligned_axis(scale, kernel, apart) for kernel, apart in zip((kh, kw), dilation, strict=True)]
        else:
            axes = [convolution_axis(*numbers) for numbers in zip(stride, padding, dilation, strict=True)]
        plans = [
            _Axis(axis, kernel, out_side, side, aligned=aligned)
            for axis, kernel, out_side, side in zip(axes, (kh, kw), (height, width), feature.shape[2:], strict=True)
        ]
        factor = mask
        if level_weight is not None:
            of_level = level_weight[:, level, None, None, None]
            taps = (offset.shape[0], offset.shape[1] // 2, height, width)
            factor = of_level.expand(taps) if mask is None else mask * of_level
        out_of_level = _deform_conv_of_level(
            feature.to(wide),
            _offsets(offset, plans, kh, kw),
            weight[level].to(wide),
            bias.to(wide) if bias is not None and level == 0 else None,
            factor,
            plans,
            groups=feature.shape[1] // group_channels,
        )
        out = out_of_level if out is None else out + out_of_level
    return out.to(dtype)


class _Axis:
    """How DeformConv reads a level along one axis.

    Attributes:
        map: what it has to read.
        stride, dilation, pad: of DeformConv; the same padding at both ends, which is all that TensorRT takes.
        more: pixels of zeros that go behind the level before, so that the output has its size; no integer where
            sizes are not known.
    """

    def __init__(self, axis: AxisMap, kernel: int, out_side: int, side: int, *, aligned: bool) -> None:
        self.map, self.stride, self.dilation = axis, max(1, math.ceil(axis.step)), max(1, round(axis.tap))
        self.pad, self.more = -axis.origin, 0
        if not aligned:
            return
        # So many pixels at most, and up to a stride fewer, give this output.
        missing = _known(self.stride * out_side + self.dilation * (kernel - 1) - side)
        while isinstance(missing, int) and missing < 0:  # an output far from the level's size
            self.stride, missing = self.stride + 1, _known(missing + out_side)
        if not isinstance(missing, int):
            self.pad, self.more = 0, missing
        else:
            self.pad, self.more = missing // 2, missing % 2 if self.stride == 1 else 0

    def rest(self) -> AxisMap:
        """What offsets have to make up for."""
        axis = self.map
        return AxisMap(axis.step - self.stride, axis.tap - self.dilation, axis.shift, axis.origin + self.pad)


def _known(number: int | torch.SymInt) -> int | torch.SymInt:
    """A number as Python's, if it is the same for all sizes."""
    value = number.node.maybe_as_int() if isinstance(number, torch.SymInt) else None
    return number if value is None else value


def _offsets(offset: Tensor, axes: Sequence[_Axis], kh: int, kw: int) -> Tensor:
    """Offsets in pixels of the level from DeformConv's grid. In four dimensions: OpenVINO errs in seven."""
    y, x = (axis.rest() for axis in axes)
    if y == x == AxisMap(0, 0, 1, 0):
        return offset
    channel = torch.arange(offset.shape[1], device=offset.device).view(1, -1, 1, 1)
    tap, is_y = channel // 2 % (kh * kw), channel % 2 == 0

    def places(rest: AxisMap, tap: Tensor, side: int, shape: tuple[int, ...]) -> Tensor:
        where = rest.tap * tap.double() + rest.origin
        if rest.step:
            where = where + rest.step * torch.arange(side, dtype=torch.float64, device=offset.device).view(shape)
        return where.to(offset.dtype)  # rounded once

    rows = places(y, tap // kw, offset.shape[2], (1, 1, -1, 1))
    columns = places(x, tap % kw, offset.shape[3], (1, 1, 1, -1))
    if y.shift != x.shift:
        offset = torch.where(is_y, y.shift * offset, x.shift * offset)
    elif y.shift != 1:
        offset = y.shift * offset
    return offset + torch.where(is_y, rows, columns)


def _deform_conv_of_level(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    axes: Sequence[_Axis],
    groups: int,
) -> Tensor:
    if any(not isinstance(axis.more, int) or axis.more > 0 for axis in axes):
        x = F.pad(x, (0, axes[1].more, 0, axes[0].more))
    kh, kw = weight.shape[2:]
    return torch.onnx.ops.symbolic(
        "DeformConv",
        (x, weight, offset, bias, mask),
        {
            "kernel_shape": [kh, kw],
            "strides": [axis.stride for axis in axes],
            "dilations": [axis.dilation for axis in axes],
            "pads": [axis.pad for axis in axes] * 2,
            "group": groups,
            "offset_group": offset.shape[1] // (2 * kh * kw),
        },
        dtype=x.dtype,
        shape=(x.shape[0], weight.shape[0], *offset.shape[2:]),
    )


def register() -> None:
    """Tells PyTorch's exporter what the compiled operators are, for programs that were exported before.

    Not by PyTorch's table of decompositions, which is everybody's: Inductor would be told of one that it must not use.
    """
    definitions = {
        "pyramid_deform_conv2d": deform_conv,
        "channel_statistics": define_channel_statistics,
        "affine_maximum": define_affine_maximum,
        "border_align": define_border_align,
        "deform_roi_pool": define_deform_roi_pool,
    }
    for name, function in definitions.items():
        torch.library.register_torch_dispatch(f"dyhead::{name}", ProxyTorchDispatchMode, _tracing(function))


def _tracing(definition: Callable[..., Tensor]) -> Callable[..., Any]:
    """How an operator is traced: as its definition while ONNX is exported, else as itself."""

    def trace(
        mode: ProxyTorchDispatchMode,
        operator: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not exporting():
            return mode.__torch_dispatch__(operator, types, args, kwargs)
        with mode:
            return definition(*args, **(kwargs or {}))

    return trace


if library.PROBLEM is None:
    register()
