"""Levels of other widths than the blocks': 1x1 convolutions before and behind them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dyhead.layers.levels import Pyramid, join_pyramid, split_levels


class PyramidAdapter(nn.Module):
    """A 1x1 convolution for each level of a pyramid, from its number of channels to another.

    Levels that have the wanted number already pass as they are. Weights start as He et al. give them for a layer
    without activation, and biases at 0, so that the variance is kept.

    Args:
        in_channels: channels of each level, or one number for all levels, which then share a convolution.
        out_channels: likewise, a list of as many if both are lists.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 16, 16), torch.randn(2, 128, 8, 8)]
        >>> [tuple(level.shape) for level in PyramidAdapter([64, 128], 64)(levels)]
        [(2, 64, 16, 16), (2, 64, 8, 8)]
    """

    def __init__(self, in_channels: int | Sequence[int], out_channels: int | Sequence[int]) -> None:
        super().__init__()
        count = max(1 if isinstance(x, int) else len(x) for x in (in_channels, out_channels))
        ins, outs = ([x] * count if isinstance(x, int) else list(x) for x in (in_channels, out_channels))
        self.in_channels = ins
        self.shared = isinstance(in_channels, int) and isinstance(out_channels, int)
        self.convolutions = nn.ModuleList(
            nn.Identity() if a == b else nn.Conv2d(a, b, 1) for a, b in zip(ins, outs, strict=True)
        )
        for convolution in self.convolutions:
            if isinstance(convolution, nn.Conv2d):
                nn.init.kaiming_uniform_(convolution.weight, a=1)
                nn.init.zeros_(convolution.bias)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and sizes.

        Raises:
            TypeError, ValueError: not a valid pyramid, or another number of levels than there are convolutions.
        """
        levels = split_levels(pyramid, self.in_channels, self.shared)
        out: list[Tensor] = []
        for i, convolution in enumerate(self.convolutions):
            for level in levels if self.shared else levels[i : i + 1]:
                out.append(convolution(level))
        return join_pyramid(out, pyramid)
