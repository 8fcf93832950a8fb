"""One block of the Dynamic Head, Eq. 2 of the paper."""

from __future__ import annotations

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

    Each attention can be switched off, as in the paper's ablation; with all three off the block is the identity.
    With the spatial-aware attention on, the scale-aware weights are folded into its sum; with it off, they multiply
    the levels.

    Args:
        channels: channels C of every level, in and out.
        window: number of levels on each side of a level that spatial-aware attention reads; None is the whole pyramid.
        scale_aware: apply Eq. 3.
        spatial_aware: apply Eq. 4.
        task_aware: apply Eq. 5.
        offset_groups: channel groups with separate offsets in the spatial-aware attention.
        norm_groups: groups of its GroupNorm.

    Raises:
        ValueError: see the three attentions.

    Example:
        >>> import torch
        >>> block = DyHeadBlock(64)
        >>> pyramid = {"p3": torch.randn(2, 64, 16, 16), "p4": torch.randn(2, 64, 8, 8)}
        >>> {name: tuple(level.shape) for name, level in block(pyramid).items()}
        {'p3': (2, 64, 16, 16), 'p4': (2, 64, 8, 8)}
    """

    def __init__(
        self,
        channels: int,
        *,
        window: int | None = 1,
        scale_aware: bool = True,
        spatial_aware: bool = True,
        task_aware: bool = True,
        offset_groups: int = 1,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        self.channels = channels = check_integer("channels", channels)
        self.scale_attention = ScaleAwareAttention(channels) if scale_aware else None
        self.spatial_attention = (
            SpatialAwareAttention(channels, window=window, offset_groups=offset_groups, norm_groups=norm_groups)
            if spatial_aware
            else None
        )
        self.task_attention = TaskAwareAttention(channels) if task_aware else None

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Raises:
            TypeError, ValueError: not a valid pyramid (no levels, wrong order, sizes, channels, ...). Names the level,
                what was expected and what came.
        """
        levels = split_pyramid(pyramid, self.channels)
        # Conditions are nested, not joined, for torch.jit.script, which leaves out branches of absent attentions then.
        weight: Tensor | None = None
        if self.scale_attention is not None:
            weight = self.scale_attention(levels)
        norm: ChannelAffine | None = None
        if self.spatial_attention is not None:
            if self.task_attention is not None:
                # The norm between the two is merged into the activation: one pass for its statistics, one for both.
                levels = self.spatial_attention.aggregate(levels, weight)
                statistics = torch.stack([channel_statistics(level) for level in levels], dim=1)
                group_norm = self.spatial_attention.norm
                norm = affine_of_group_norm(
                    statistics, group_norm.weight, group_norm.bias, group_norm.num_groups, group_norm.eps
                )
            else:
                levels = self.spatial_attention(levels, weight)
        elif weight is not None:
            levels = [level * weight[:, i, None, None, None] for i, level in enumerate(levels)]
        if self.task_attention is not None:
            levels = self.task_attention(levels, norm)
        return join_pyramid(levels, pyramid)
