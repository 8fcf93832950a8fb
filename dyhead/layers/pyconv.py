"""Pyramidal Convolution (Duta et al., "Pyramidal Convolution: Rethinking Convolutional Neural Networks for Visual
Recognition", 2020): kernels of several sizes side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PyConv2d(nn.Module):
    """Convolutions of the same map with kernels of several sizes, whose outputs are concatenated.

    The larger a kernel, the more groups of channels it has, which do not read each other: so it costs little more.

    Args:
        in_channels: channels of the input.
        out_channels: channels that each kernel computes.
        kernels: their sizes, odd.
        groups: of each kernel.
        stride: of all.
        bias: add one number to each channel of the output.

    Raises:
        ValueError: not as many sizes, groups and numbers of channels; an even size; groups that do not divide channels.

    Example:
        >>> PyConv2d(64, [16, 16, 32], kernels=[3, 5, 7], groups=[1, 4, 8], stride=2)(torch.randn(1, 64, 9, 12)).shape
        torch.Size([1, 64, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Sequence[int],
        kernels: Sequence[int],
        groups: Sequence[int],
        stride: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not len(out_channels) == len(kernels) == len(groups) > 0:
            raise ValueError(
                f"out_channels, kernels, groups: expected as many of each, got {len(out_channels)}, {len(kernels)}, "
                f"{len(groups)}"
            )
        if any(size % 2 == 0 for size in kernels):
            raise ValueError(f"kernels: expected odd sizes, got {list(kernels)}")
        self.levels = nn.ModuleList(
            nn.Conv2d(in_channels, channels, size, stride, size // 2, groups=count, bias=bias)
            for channels, size, count in zip(out_channels, kernels, groups, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, sum of ``out_channels``, H, W), where H is H_in / stride, rounded up."""
        return torch.cat([level(x) for level in self.levels], dim=1)
