"""Pyramid convolutions: three 3x3 kernels, for the finer, the same and the coarser level, shared by all levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.batch_norm import build_norm, normalize
from dyhead.layers.conv_norm import padded_if_narrow
from dyhead.layers.levels import EagerPyramidModule, Pyramid, check_integer, join_pyramid, split_pyramid
from dyhead.ops import deform_conv2d, pyramid_deform_conv2d

_OFFSETS = 18  # (dy, dx) of nine taps


class PConv(EagerPyramidModule):
    """Pyramid convolution (Wang et al., "Scale-Equalizing Pyramid Convolution for Object Detection", CVPR 2020).

    For each level l, fine to coarse,

        out_l = ReLU(norm( same(x_l) + finer(x_{l-1}) + resize(coarser(x_{l+1})) ))

    ``finer`` has stride 2; ``resize`` is bilinear, corners aligned, to the size of level l; terms outside the pyramid
    are missing. The three convolutions (3x3, padding 1, with bias) are shared by all levels.

    ``deformable`` makes them deformable convolutions without masks, with the same weights, where the *output* level is
    not the finest. Each has a zero-initialised 3x3 convolution of its own, with bias, that predicts its offsets from
    its own input, at its own stride.

    Args:
        channels: channels C of every level, in and out.
        deformable: see above.
        norm: "" none; "BN" integrated batch normalization, one BatchNorm2d over the pixels of all levels and images
            together; "SyncBN" also over all devices. Its statistics need several images: the authors had 4 for each
            device.

    Raises:
        ValueError: ``channels`` is no integer or below 1; an unknown ``norm``.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 15, 16), torch.randn(2, 64, 8, 8)]
        >>> [tuple(level.shape) for level in PConv(64, deformable=True, norm="BN")(levels)]
        [(2, 64, 15, 16), (2, 64, 8, 8)]
    """

    def __init__(self, channels: int, *, deformable: bool = False, norm: str = "") -> None:
        super().__init__()
        self.channels = channels = check_integer("channels", channels)
        self.finer = LevelConv(channels, stride=2, deformable=deformable)
        self.same = LevelConv(channels, deformable=deformable)
        self.coarser = LevelConv(channels, deformable=deformable)
        self.norm = build_norm(norm, channels)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Args:
            pyramid: levels (N, C, H_l, W_l), each half the size of the one before it, rounded up.

        Raises:
            TypeError, ValueError: not a valid pyramid. Names the level, what was expected and what came.
        """
        levels = split_pyramid(pyramid, self.channels, round_up=True)
        sums = []
        for m, level in enumerate(levels):
            out = self.same(level, m)
            if m > 0:
                out = out + self.finer(levels[m - 1], m)
            if m + 1 < len(levels):
                coarse = self.coarser(levels[m + 1], m)
                resized = functional.interpolate(coarse, level.shape[2:], mode="bilinear", align_corners=True)
                out = out + resized.to(out.dtype)  # autocast resizes in float32 on CUDA
            sums.append(out)
        return join_pyramid([level.relu() for level in normalize(self.norm, sums)], pyramid)


class SampledPConv(EagerPyramidModule):
    """A pyramid convolution that samples before it convolves: one call of the operator of Eq. 4 for each level.

    For each level m, over the levels l in {m-1, m, m+1} that there are,

        out_m = ReLU(norm( bias + sum_l sum_k  w_{l-m,k} . F_l(p_k + dp_k) ))

    in the geometry of :func:`dyhead.ops.pyramid_deform_conv2d`. It is in no paper. It is not the function of
    :class:`PConv`, and weights of one mean nothing in the other:

    * The coarser level is read, bilinearly, at the taps of the output's own grid, which are half of its pixels apart;
      PConv convolves it on its own grid, whose taps lie twice as far apart in the image, and resizes the result.
    * Pixels of two levels correspond by their areas in the image; in PConv by the corners' centers (coarser) and by
      every second pixel (finer).
    * One zero-initialised 3x3 convolution on the output level predicts the offsets, which the three kernels share; in
      PConv each has its own, on its input.
    * The finest level is deformable, too.

    The work on a level is that of three convolutions of its size, where PConv's coarser one is a quarter.

    Args:
        channels: channels C of every level, in and out.
        norm: see :class:`PConv`.

    Raises:
        ValueError: see :class:`PConv`.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 15, 16), torch.randn(2, 64, 7, 8)]
        >>> [tuple(level.shape) for level in SampledPConv(64)(levels)]
        [(2, 64, 15, 16), (2, 64, 7, 8)]
    """

    def __init__(self, channels: int, *, norm: str = "") -> None:
        super().__init__()
        self.channels = channels = check_integer("channels", channels)
        self.offset = _offset_convolution(channels, stride=1, padding=1)
        self.weight = nn.Parameter(torch.empty(3, channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = build_norm(norm, channels)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Args:
            pyramid: levels (N, C, H_l, W_l), each half the size of the one before it; an odd size is rounded either
                way.

        Raises:
            TypeError, ValueError: not a valid pyramid. Names the level, what was expected and what came.
        """
        levels = split_pyramid(pyramid, self.channels)
        sums = []
        for m, level in enumerate(levels):
            first, last = max(m - 1, 0), min(m + 1, len(levels) - 1)
            out = pyramid_deform_conv2d(
                levels[first : last + 1],
                self.offset(level),
                self.weight[1 - (m - first) : 2 + (last - m)],
                self.bias,
                scales=[2.0 ** (m - source) for source in range(first, last + 1)],
            )
            sums.append(out)
        return join_pyramid([level.relu() for level in normalize(self.norm, sums)], pyramid)


class LevelConv(nn.Module):
    """A 3x3 convolution with bias, shared by levels, that may be deformable on all of them but the finest.

    Args:
        channels: channels C, in and out.
        stride: of the convolution and of the one that predicts its offsets.
        padding: likewise.
        deformable: see :class:`PConv`.
    """

    def __init__(self, channels: int, *, stride: int = 1, padding: int = 1, deformable: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.offset = _offset_convolution(channels, stride, padding) if deformable else None
        nn.init.normal_(self.weight, std=0.01)

    def extra_repr(self) -> str:
        """The arguments that do not appear in submodules."""
        return f"{self.weight.shape[0]}, stride={self.stride}, padding={self.padding}"

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(N, C, H, W) to (N, C, H', W'), where ``level`` is the index of the level that it is computed for."""
        if self.offset is None or level == 0:
            return self._convolve(x, self.weight, self.bias)
        offset = self._convolve(x, self.offset.weight, self.offset.bias)
        return deform_conv2d(x, offset, self.weight, self.bias, stride=self.stride, padding=self.padding)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padding = self.padding
        if self.stride > 1:
            x, padding = padded_if_narrow(x, padding)
        return functional.conv2d(x, weight, bias, self.stride, padding)


def _offset_convolution(channels: int, stride: int, padding: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, _OFFSETS, 3, stride, padding)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
