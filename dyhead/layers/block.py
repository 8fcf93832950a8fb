"""One block of the Dynamic Head, Eq. 2 of the paper."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dyhead.layers.group_norm import ChannelAffine, affine_of_group_norm
from dyhead.layers.levels import Pyramid, check_integer, join_pyramid, split_pyramid
from dyhead.layers.scale_attention import ScaleAwareAttention
from dyhead.layers.spatial_attention import SpatialAwareAttention
from dyhead.layers.task_attention import TaskAwareAttention
from dyhead.ops.channelwise import channel_statistics


class DyHeadBlock(nn.Module):
    """Scale-, spatial- and task-aware attention in turn, ``pi_C(pi_S(pi_L(F) F) F) F`` (Eq. 2).

    Each attention can be switched off, as in the paper's ablation; with all three off and no shortcut the block is the
    identity. With the spatial-aware attention on, the scale-aware weights are folded into its sum; with it off, they
    multiply the levels.

    Args:
        channels: channels C of every level, in and out.
        window: number of levels on each side of a level that spatial-aware attention reads; None is the whole pyramid.
        scale_aware: apply Eq. 3.
        spatial_aware: apply Eq. 4.
        task_aware: apply Eq. 5.
        offset_groups: channel groups with separate offsets in the spatial-aware attention.
        norm: its normalisation, "GN", "BN", "SyncBN" or None.
        norm_groups: groups of its GroupNorm.
        zero_init_offset: start its offset convolution at zero.
        shortcut: add F to the result, as a residual network does; the paper's block does not.

    Raises:
        ValueError: see the three attentions.

    Example:
        >>> import torch
        >>> block = DyHeadBlock(64)
        >>> pyramid = {"p3": torch.randn(2, 64, 16, 16), "p4": torch.randn(2, 64, 8, 8)}
        >>> {name: tuple(level.shape) for name, level in block(pyramid).items()}
        {'p3': (2, 64, 16, 16), 'p4': (2, 64, 8, 8)}
    """

    __constants__ = ("merges_norm",)  # so that torch.jit.script leaves out the branch that is not taken

    def __init__(
        self,
        channels: int,
        *,
        window: int | None = 1,
        scale_aware: bool = True,
        spatial_aware: bool = True,
        task_aware: bool = True,
        offset_groups: int = 1,
        norm: Literal["GN", "BN", "SyncBN"] | None = "GN",
        norm_groups: int = 16,
        zero_init_offset: bool = True,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels = check_integer("channels", channels)
        self.scale_attention = ScaleAwareAttention(channels) if scale_aware else None
        self.spatial_attention = (
            SpatialAwareAttention(
                channels,
                window=window,
                offset_groups=offset_groups,
                norm=norm,
                norm_groups=norm_groups,
                zero_init_offset=zero_init_offset,
            )
            if spatial_aware
            else None
        )
        self.task_attention = TaskAwareAttention(channels) if task_aware else None
        self.shortcut = bool(shortcut)
        # A GroupNorm is, given its statistics, a map of every channel.
        self.merges_norm = bool(spatial_aware and task_aware and norm == "GN")

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Args:
            pyramid: levels (N, C, H_l, W_l), of any sizes that do not grow and keep one ratio of height and width.

        Raises:
            TypeError, ValueError: not a valid pyramid (no levels, wrong order, sizes, channels, ...). Names the level,
                what was expected and what came.
        """
        inputs = levels = split_pyramid(pyramid, self.channels, halved=False)
        # Conditions are nested, not joined, for torch.jit.script, which leaves out branches of absent attentions then.
        weight: Tensor | None = None
        if self.scale_attention is not None:
            weight = self.scale_attention(levels)
        affine: ChannelAffine | None = None
        if self.spatial_attention is not None:
            levels = self.spatial_attention(levels, weight, not self.merges_norm)
            if self.merges_norm:
                # The norm between the two is merged into the activation: one pass for its statistics, one for both.
                statistics = torch.stack([channel_statistics(level) for level in levels], dim=1)
                norm = self.spatial_attention.norm
                affine = affine_of_group_norm(statistics, norm.weight, norm.bias, norm.num_groups, norm.eps)
        elif weight is not None:
            levels = [level * weight[:, i, None, None, None] for i, level in enumerate(levels)]
        if self.task_attention is not None:
            levels = self.task_attention(levels, affine)
        if self.shortcut:
            levels = [inputs[i] + level for i, level in enumerate(levels)]
        return join_pyramid(levels, pyramid)
