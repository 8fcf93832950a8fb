"""Spatial-aware attention, Eq. 4 of the paper: where to look, across the levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.levels import check_groups, in_memory_format_of
from dyhead.ops import pyramid_deform_conv2d


class SpatialAwareAttention(nn.Module):
    """Level-aggregated deformable sampling (Eq. 4), then GroupNorm.

    For each output level m, over the levels l of its window,

        out_m = GroupNorm( 1/L_m * sum_l sum_k  w_{l-m,k} . F_l(p_k + dp_k) * dm_k )

    in the pyramid's own geometry: the centres of the pixels coincide in the image and no level is resized
    (:func:`dyhead.ops.pyramid_deform_conv2d`). The offsets ``dp`` (pixels of level m) and the importances ``dm`` in
    (0, 1) come from level m, the median of its window, by a 3x3 convolution. ``L_m`` counts the levels that are there:
    fewer at the pyramid's ends. The weights ``w`` are three 3x3 kernels, for a finer level, the same level and a
    coarser one, shared by all output levels.

    The offset convolution starts at zero: sampling starts as a plain convolution at the levels' own places, with every
    importance at 1/2. The kernel of the same level starts as the identity, so that a deep stack starts by handing on
    what the backbone found; on it and on the two others lies noise, ``INITIAL_NOISE`` times what He et al. give a layer
    with a ReLU after it, about a third of the output's variance. (In four small trials from scratch this ended
    at a loss 0.4 to 3 percent below He et al.'s alone.) What the halves, the 1/L_m and the level weights
    take from the sum, GroupNorm gives back, so it is not made up for in the kernels: larger kernels under a
    normalisation give the same output and merely learn more slowly.

    Args:
        channels: channels C of every level, in and out.
        window: how many levels on each side of a level it sees; None is the whole pyramid (levels further than one
            step use the kernel of their side).
        offset_groups: groups of channels with offsets and importances of their own.
        norm_groups: groups of the GroupNorm.

    Raises:
        ValueError: ``offset_groups`` or ``norm_groups`` does not divide ``channels``; ``window`` below 1.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 16, 16), torch.randn(2, 64, 8, 8)]
        >>> [tuple(level.shape) for level in SpatialAwareAttention(64)(levels)]
        [(2, 64, 16, 16), (2, 64, 8, 8)]
    """

    INITIAL_NOISE = 0.3

    def __init__(self, channels: int, *, window: int | None = 1, offset_groups: int = 1, norm_groups: int = 16) -> None:
        super().__init__()
        check_groups("offset_groups", offset_groups, channels)
        check_groups("norm_groups", norm_groups, channels)
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1, or None for the whole pyramid, got {window}")
        self.window = window
        self.offset_groups = offset_groups
        taps = 9
        self.offset = nn.Conv2d(channels, 3 * offset_groups * taps, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(3, channels, channels, 3, 3))
        self.norm = nn.GroupNorm(norm_groups, channels)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        with torch.no_grad():
            for weight in self.weight:
                nn.init.kaiming_normal_(weight, nonlinearity="relu").mul_(self.INITIAL_NOISE)
            self.weight[1] += nn.init.dirac_(torch.empty_like(self.weight[1]))

    def extra_repr(self) -> str:
        """The arguments that the submodules do not show."""
        return f"window={self.window}, offset_groups={self.offset_groups}"

    def forward(self, levels: Sequence[Tensor], level_weight: Tensor | None = None) -> list[Tensor]:
        """A pyramid in, a pyramid of the same shapes out.

        Args:
            levels: L levels (N, C, H_l, W_l), fine to coarse, each half the size of the one before it.
            level_weight: (N, L), the scale-aware attention (Eq. 3). The result is the one for levels multiplied by
                it, without that product in memory.
        """
        # Autocast runs the norm in float32; what follows needs no more than the operator's own type.
        return [in_memory_format_of(self.norm(x).to(x.dtype), x) for x in self.aggregate(levels, level_weight)]

    def aggregate(self, levels: Sequence[Tensor], level_weight: Tensor | None = None) -> list[Tensor]:
        """What :meth:`forward` normalises: the sums over levels and taps."""
        out = []
        for m, level in enumerate(levels):
            first, last = self._window_of(m, len(levels))
            offset, mask = self._offset_and_mask(level, None if level_weight is None else level_weight[:, m])
            finer, coarser = m - first, last - m
            if level_weight is None:
                window_weight = level.new_full((level.shape[0], last - first + 1), 1 / (last - first + 1))
            else:
                window_weight = level_weight[:, first : last + 1] / (last - first + 1)
            x = pyramid_deform_conv2d(
                list(levels[first : last + 1]),
                offset,
                self._kernels(finer, coarser),
                mask=mask,
                level_weight=window_weight,
                scales=[2.0 ** (m - source) for source in range(first, last + 1)],
            )
            out.append(in_memory_format_of(x, level))
        return out

    def _window_of(self, m: int, num_levels: int) -> tuple[int, int]:
        """First and last level that output level ``m`` sees."""
        if self.window is None:
            return 0, num_levels - 1
        return max(m - self.window, 0), min(m + self.window, num_levels - 1)

    def _offset_and_mask(self, level: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Offsets (N, 2GK, H, W) and importances (N, GK, H, W) from the level times its weight (N,)."""
        if weight is None:
            x = self.offset(level)
        else:
            # The convolution is linear: weighing its 27 G channels instead of the level's C is the same and cheaper.
            x = functional.conv2d(level, self.offset.weight, padding=1)
            x = x * weight[:, None, None, None] + self.offset.bias[:, None, None]
        offset, mask = x.split([x.shape[1] // 3 * 2, x.shape[1] // 3], dim=1)
        return offset, mask.sigmoid()

    def _kernels(self, finer: int, coarser: int) -> Tensor:
        """The kernels (L_m, C, C, 3, 3) of a window with so many finer and coarser levels."""
        if finer <= 1 and coarser <= 1:
            return self.weight[1 - finer : 2 + coarser]
        return self.weight[[0] * finer + [1] + [2] * coarser]
