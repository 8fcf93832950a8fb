"""The deformable convolutions of ``mmcv.ops``, by its names: replace the import, and nothing else.

Constructors, arguments and their order, names of parameters, their initialisation, and the type that is computed in are
mmcv's. What differs: they run without a GPU, and sizes that do not fit each other are errors.

Shapes: N batch, C channels, K = kh * kw taps, G groups of channels with offsets of their own, (H, W) the output's size.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dyhead.layers import deform_conv
from dyhead.layers.levels import check_groups, flat
from dyhead.ops import deform_conv2d as torchvision_deform_conv2d
from dyhead.ops.checks import as_pair
from dyhead.ops.functional import AUTOCAST_DEVICES

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "deform_conv2d",
    "modulated_deform_conv2d",
]


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    *,
    flat_offsets: bool = False,
) -> Tensor:
    """Modulated deformable convolution (Zhu et al., CVPR 2019).

    Args:
        input: (N, C_in, H_in, W_in).
        offset: (N, 2*G*K, H, W), in pixels of ``input``; dy and dx of a tap are adjacent, taps row by row.
        mask: (N, G*K, H, W), the weight of every sample.
        weight: (C_out, C_in/groups, kh, kw).
        bias: (C_out,).
        stride, padding, dilation: in pixels of ``input``; an int or (vertical, horizontal).
        groups: groups of channels that are convolved apart.
        deform_groups: groups G of channels with offsets of their own.
        flat_offsets: take offsets and masks that are larger than the output, and read the start of each image's memory
            (NCHW) as if it had the output's size. That is what mmcv does with them without a word, and what the
            published DyHead weights were trained with. Otherwise they are an error.

    Returns:
        (N, C_out, H, W) in the type of ``offset``, to which everything is cast, under autocast, too.

    Raises:
        ValueError: channels or sizes that do not fit each other. Names the argument, what was expected and what came.
        RuntimeError: other wrong arguments, likewise.
    """
    return _convolve(
        input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups, flat_offsets
    )  # fmt: skip


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Deformable convolution (Dai et al., ICCV 2017): :func:`modulated_deform_conv2d` without mask and bias.

    ``bias`` may only be False, as in mmcv. ``im2col_step``, how many images mmcv unfolds at a time, has no meaning
    here: nothing is unfolded, and any batch will do.
    """
    _refuse_bias(bias)
    return _convolve(input, offset, None, weight, None, stride, padding, dilation, groups, deform_groups, False)


class ModulatedDeformConv2d(deform_conv.DeformConv2d):
    """``mmcv.ops.ModulatedDeformConv2d``: a modulated deformable convolution that is given its offsets and masks.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of a convolution.
        deform_groups: groups of channels with offsets of their own.
        flat_offsets: see :func:`modulated_deform_conv2d`.

    Raises:
        ValueError: ``deform_groups`` does not divide ``in_channels``; see also :class:`dyhead.layers.DeformConv2d`.

    Example:
        >>> import torch
        >>> layer = ModulatedDeformConv2d(32, 64, 3, padding=1, deform_groups=2)
        >>> layer(torch.randn(1, 32, 8, 8), torch.zeros(1, 36, 8, 8), torch.ones(1, 18, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        flat_offsets: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bool(bias))
        self.deform_groups = check_groups("deform_groups", deform_groups, in_channels)
        self.flat_offsets = flat_offsets

    def reset_parameters(self) -> None:
        """Weights uniform within 1 / sqrt(C_in * K) on both sides of 0, biases 0."""
        bound = (self.in_channels * self.kernel_size[0] * self.kernel_size[1]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """(N, C_out, H, W) in the type of ``offset``; the arguments are those of :func:`modulated_deform_conv2d`."""
        return _convolve(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            self.deform_groups, self.flat_offsets,
        )  # fmt: skip


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    """``mmcv.ops.ModulatedDeformConv2dPack``: predicts its offsets and masks by a convolution, which starts at 0.

    Args:
        *args, **kwargs: of :class:`ModulatedDeformConv2d`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = _offset_convolution(self, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W)."""
        positions = self.conv_offset(x)
        taps = positions.shape[1] // 3
        return super().forward(x, positions[:, : 2 * taps], positions[:, 2 * taps :].sigmoid())


class DeformConv2d(deform_conv.DeformConv2d):
    """``mmcv.ops.DeformConv2d``: a deformable convolution without bias that is given its offsets.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of a convolution.
        deform_groups: groups of channels with offsets of their own.
        bias: may only be False, as in mmcv.
        im2col_step: has no meaning here, see :func:`deform_conv2d`.

    Raises:
        ValueError: ``bias`` is not False; see also :class:`ModulatedDeformConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _refuse_bias(bias)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False)
        self.deform_groups = check_groups("deform_groups", deform_groups, in_channels)
        self.im2col_step = im2col_step

    def reset_parameters(self) -> None:
        """He et al.'s uniform initialisation for a ReLU."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """(N, C_out, H, W) in the type of ``offset``; the arguments are those of :func:`deform_conv2d`."""
        return _convolve(
            x, offset, None, self.weight, None, self.stride, self.padding, self.dilation, self.groups,
            self.deform_groups, False,
        )  # fmt: skip


class DeformConv2dPack(DeformConv2d):
    """``mmcv.ops.DeformConv2dPack``: predicts its offsets by a convolution, which starts at 0.

    Args:
        *args, **kwargs: of :class:`DeformConv2d`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.conv_offset = _offset_convolution(self, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W)."""
        return super().forward(x, self.conv_offset(x))


def _convolve(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    deform_groups: int,
    flat_offsets: bool,
) -> Tensor:
    stride, padding, dilation = (
        as_pair(name, value, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    taps = weight.shape[2] * weight.shape[3]
    _check("input", input, weight.shape[1] * groups)
    size = [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    offset = _of_size("offset", offset, 2 * deform_groups * taps, size, flat_offsets)
    if mask is not None:
        mask = _of_size("mask", mask, deform_groups * taps, size, flat_offsets).to(offset.dtype)
    if bias is not None:
        bias = bias.to(offset.dtype)
    device = input.device.type
    with torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext():
        return torchvision_deform_conv2d(
            input.to(offset.dtype), offset, weight.to(offset.dtype), bias, stride, padding, dilation, mask
        )


def _check(name: str, x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name}: expected (N, {channels}, H, W), got {tuple(x.shape)}")


def _of_size(name: str, x: Tensor, channels: int, size: list[int], flat_offsets: bool) -> Tensor:
    """``x``, the argument ``name``, in the output's size."""
    _check(name, x, channels)
    if x.shape[2] == size[0] and x.shape[3] == size[1]:
        return x
    got = f"{x.shape[2]} x {x.shape[3]}"
    if not flat_offsets or x.shape[2] * x.shape[3] < size[0] * size[1]:
        least = "at least " if flat_offsets else ""
        hint = "" if flat_offsets else ", which flat_offsets=True reads as mmcv does"
        raise ValueError(f"{name}: expected {least}the output's size {size[0]} x {size[1]}, got {got}{hint}")
    return flat(x, size)


def _refuse_bias(bias: object) -> None:
    if bias is not False:
        raise ValueError(f"bias: expected False, as mmcv's deformable convolution without masks has none, got {bias!r}")


def _offset_convolution(layer: ModulatedDeformConv2d | DeformConv2d, per_tap: int) -> nn.Conv2d:
    channels = per_tap * layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    convolution = nn.Conv2d(layer.in_channels, channels, *geometry)
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution
