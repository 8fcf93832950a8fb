"""Task-aware attention, Eq. 5 of the paper: which channels are active."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyhead.layers.group_norm import ChannelAffine
from dyhead.layers.levels import check_groups, check_integer
from dyhead.ops.channelwise import affine_maximum, channel_statistics


class TaskAwareAttention(nn.Module):
    """Dynamic ReLU, ``max(a1 * F_c + b1, a2 * F_c + b2)`` with coefficients per channel c (Eq. 5).

    ``theta``, which computes the coefficients, is that of DY-ReLU (Chen et al., ECCV 2020) with the paper's additional
    normalisation: the average over space and then over levels, so that all levels have equal weight; a linear layer
    C -> C/reduction, ReLU, a linear layer -> 4 C, LayerNorm, and the shifted sigmoid ``2 sigmoid(x) - 1`` in [-1, 1].
    Its result t is a residual on the plain ReLU: ``a1 = 1 + t_a1, a2 = t_a2, b1 = t_b1 / 2, b2 = t_b2 / 2``.

    The LayerNorm's gain is initialised to ``INITIAL_GAIN``: the activation starts within a few percent of ReLU, and
    every parameter has a gradient (with a gain of 0 the linear layers would have none).

    Args:
        channels: channels C of every level.
        reduction: the hidden layer has C / reduction channels.

    Raises:
        ValueError: ``channels`` is no integer or below 1; ``reduction`` does not divide it.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 16, 16), torch.randn(2, 64, 8, 8)]
        >>> [tuple(level.shape) for level in TaskAwareAttention(64)(levels)]
        [(2, 64, 16, 16), (2, 64, 8, 8)]
    """

    INITIAL_GAIN = 0.1

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        channels = check_integer("channels", channels)
        reduction = check_groups("reduction", reduction, channels)
        self.theta = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(),
            nn.Linear(channels // reduction, 4 * channels),
            nn.LayerNorm(4 * channels),
        )
        nn.init.constant_(self.theta[3].weight, self.INITIAL_GAIN)

    def forward(self, levels: list[Tensor], affine: ChannelAffine | None = None) -> list[Tensor]:
        """Applies the activation to each level; all levels of an image share one set of coefficients.

        Args:
            levels: L levels (N, C, H_l, W_l).
            affine: a map to apply to the levels first, such as a norm. The result is the same as for mapped levels,
                but these are never stored.
        """
        mean = torch.stack([channel_statistics(x)[:, 0] for x in levels], dim=1) if affine is None else affine.mean
        t = self.theta(mean.mean(dim=1).to(self.theta[3].weight.dtype)).to(mean.dtype)
        t = 2 * t.sigmoid() - 1
        a1, a2, b1, b2 = t.chunk(4, dim=1)
        slopes = torch.stack([1 + a1, a2], dim=1)[:, None].expand(-1, len(levels), -1, -1)  # (N, L, 2, C)
        intercepts = torch.stack([b1 / 2, b2 / 2], dim=1)[:, None].expand_as(slopes)
        if affine is not None:
            intercepts = intercepts + slopes * affine.intercept[:, :, None]
            slopes = slopes * affine.slope[:, :, None]
        out: list[Tensor] = []
        for i, x in enumerate(levels):
            out.append(affine_maximum([x], slopes[:, i, :, None], intercepts[:, i]))
        return out
