"""Spatial-aware attention, Eq. 4 of the paper: where to sample, across levels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.batch_norm import build_norm, normalize
from dyhead.layers.levels import check_groups, check_integer, in_memory_format_of, relative_strides
from dyhead.ops import pyramid_deform_conv2d
from dyhead.ops.checks import as_integer, describe

#: The normalisations of :class:`SpatialAwareAttention`.
NORMS = ("GN", "BN", "SyncBN", None)


class SpatialAwareAttention(nn.Module):
    """Level-aggregated deformable sampling (Eq. 4), then a normalisation.

    For each output level m, over the levels l of its window,

        out_m = norm( 1/L_m * sum_l sum_k  w_{l-m,k} . F_l(p_k + dp_k) * dm_k )

    in the pyramid's own geometry: pixel positions are aligned in the image and no level is resized
    (:func:`dyhead.ops.pyramid_deform_conv2d`). A 3x3 convolution predicts the offsets ``dp`` (pixels of level m) and
    the importances ``dm`` in (0, 1) from level m, the median of its window. ``L_m`` is the number of levels in the
    window, fewer at the pyramid's ends. The weights ``w`` are three 3x3 kernels, for a finer level, the same level and
    a coarser one, shared by all output levels.

    The offset convolution is initialised to zero, so that sampling starts as a plain convolution with every importance
    at 1/2. The kernel of the same level is initialised as the identity, so that a deep stack first passes on the
    backbone's features; all three kernels get noise of ``INITIAL_NOISE`` times the standard deviation that He et al.
    give a layer followed by a ReLU, about a third of the output's variance. (docs/evidence.md compares this with He et
    al.'s initialisation alone.) GroupNorm undoes the attenuation by the importances, 1/L_m and the level weights, so
    the kernels do not compensate for it: under a normalisation, larger kernels give the same output and only learn
    more slowly.

    Args:
        channels: channels C of every level, in and out.
        window: number of levels on each side of a level that it reads; None is the whole pyramid (levels more than one
            step away use the kernel of their side).
        offset_groups: channel groups with separate offsets and importances.
        norm: "GN", a GroupNorm; "BN", one BatchNorm2d over the pixels of all levels and images together, whose
            statistics need several images; "SyncBN", the same over all devices; None, none.
        norm_groups: groups of the GroupNorm, if it is one.
        zero_init_offset: start the offset convolution at zero; otherwise its weights are normal, of standard deviation
            ``INITIAL_OFFSET``.

    Raises:
        ValueError: an argument is no integer or below 1; ``offset_groups`` or ``norm_groups`` does not divide
            ``channels``; an unknown ``norm``.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 16, 16), torch.randn(2, 64, 8, 8)]
        >>> [tuple(level.shape) for level in SpatialAwareAttention(64)(levels)]
        [(2, 64, 16, 16), (2, 64, 8, 8)]
    """

    INITIAL_NOISE = 0.3
    INITIAL_OFFSET = 0.01

    def __init__(
        self,
        channels: int,
        *,
        window: int | None = 1,
        offset_groups: int = 1,
        norm: Literal["GN", "BN", "SyncBN"] | None = "GN",
        norm_groups: int = 16,
        zero_init_offset: bool = True,
    ) -> None:
        super().__init__()
        channels = check_integer("channels", channels)
        offset_groups = check_groups("offset_groups", offset_groups, channels)
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {describe(norm)}")
        if window is not None and (as_integer(window) or 0) < 1:
            raise ValueError(f"window: expected at least 1, or None for the whole pyramid, got {describe(window)}")
        self.window = as_integer(window)
        self.offset_groups = offset_groups
        taps = 9
        self.offset = WeightedConv2d(channels, 3 * offset_groups * taps, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(3, channels, channels, 3, 3))
        self.norm: nn.Module | None = None
        if norm == "GN":
            self.norm = nn.GroupNorm(check_groups("norm_groups", norm_groups, channels), channels)
        elif norm is not None:
            self.norm = build_norm(norm, channels)
        if zero_init_offset:
            nn.init.zeros_(self.offset.weight)
        else:
            nn.init.normal_(self.offset.weight, std=self.INITIAL_OFFSET)
        nn.init.zeros_(self.offset.bias)
        with torch.no_grad():
            for weight in self.weight:
                nn.init.kaiming_normal_(weight, nonlinearity="relu").mul_(self.INITIAL_NOISE)
            self.weight[1] += nn.init.dirac_(torch.empty_like(self.weight[1]))

    def extra_repr(self) -> str:
        """The arguments that do not appear in submodules."""
        return f"window={self.window}, offset_groups={self.offset_groups}"

    def forward(self, levels: list[Tensor], level_weight: Tensor | None = None, norm: bool = True) -> list[Tensor]:
        """Maps a pyramid to one of the same shapes.

        Args:
            levels: L levels (N, C, H_l, W_l), fine to coarse; see :func:`dyhead.layers.levels.relative_strides`.
            level_weight: (N, L), the scale-aware attention (Eq. 3). The result is the same as for levels
                multiplied by it, but the product is never stored.
            norm: whether to apply the normalisation.
        """
        out = self._aggregate(levels, level_weight)
        if not norm or self.norm is None:
            return out
        # Autocast runs the norm in float32; what follows needs only the operator's type.
        if torch.jit.is_scripting():
            return [in_memory_format_of(self.norm(x).to(x.dtype), x) for x in out]
        else:
            normed = [self.norm(x) for x in out] if isinstance(self.norm, nn.GroupNorm) else normalize(self.norm, out)
            return [in_memory_format_of(y.to(x.dtype), x) for x, y in zip(out, normed, strict=True)]

    def _aggregate(self, levels: list[Tensor], level_weight: Tensor | None) -> list[Tensor]:
        out: list[Tensor] = []
        strides = relative_strides(levels)
        for m, level in enumerate(levels):
            first, last = self.window_of(m, len(levels))
            offset, mask = self.offset_and_mask(level, None if level_weight is None else level_weight[:, m])
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
                scales=[strides[m] / strides[source] for source in range(first, last + 1)],
            )
            out.append(in_memory_format_of(x, level))
        return out

    def window_of(self, m: int, num_levels: int) -> tuple[int, int]:
        """First and last level in the window of output level ``m``."""
        if self.window is None:
            return 0, num_levels - 1
        return max(m - self.window, 0), min(m + self.window, num_levels - 1)

    def offset_and_mask(self, level: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Offsets (N, 2GK, H, W) and importances (N, GK, H, W) from the level times its weight (N,)."""
        x = self.offset(level, weight)
        offset, mask = x.split([x.shape[1] // 3 * 2, x.shape[1] // 3], dim=1)
        return offset, mask.sigmoid()

    def _kernels(self, finer: int, coarser: int) -> Tensor:
        """The kernels (L_m, C, C, 3, 3) of a window with these numbers of finer and coarser levels."""
        if finer <= 1 and coarser <= 1:
            return self.weight[1 - finer : 2 + coarser]
        sides = [0] * finer + [1] + [2] * coarser
        if torch.jit.is_scripting():
            return self.weight[torch.tensor(sides, device=self.weight.device)]
        else:
            return self.weight[sides]


class WeightedConv2d(nn.Conv2d):
    """A convolution of its input times a weight for every image."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(N, C, H, W) and (N,) to (N, C_out, H, W)."""
        bias = self.bias
        if weight is None:
            return functional.conv2d(x, self.weight, bias, padding=1)
        assert bias is not None  # for torch.jit.script
        # The convolution is linear: weighting its output channels is weighting its inputs, but cheaper.
        return functional.conv2d(x, self.weight, padding=1) * weight[:, None, None, None] + bias[:, None, None]
