"""The Dynamic Head: a stack of blocks on a feature pyramid."""

from __future__ import annotations

from typing import Literal

from torch import nn

from dyhead.layers.block import DyHeadBlock
from dyhead.layers.levels import Pyramid, check_integer, join_pyramid, split_pyramid, to_channels_last
from dyhead.layers.released import ReleasedDyHeadBlock

# How the published blocks read the importances of their coarser branch.
_COARSE_MASKS = {"released": "flat", "mmdetection": "flat", "mmdetection_main": "corner"}

#: The blocks that :class:`DyHead` can stack.
BLOCKS = ("paper", *_COARSE_MASKS)


class DyHead(nn.Module):
    """Dynamic Head (Dai et al., CVPR 2021): ``num_blocks`` blocks that map a feature pyramid to one of the same shapes.

    Args:
        channels: channels C of every level, in and out.
        num_blocks: how many blocks are stacked; the paper's best trade is 6. 0 is the identity.
        block: "paper" is :class:`DyHeadBlock`. "released" is :class:`ReleasedDyHeadBlock`, the block of all published
            weights of microsoft/DynamicHead and mmdetection (``dyhead convert`` renames their keys); "mmdetection" is
            another name for it. "mmdetection_main" is the same with ``coarse_mask="corner"``, for weights that were
            trained with mmdetection's main branch after release 3.3. The options below apply to "paper" alone.
        window: levels on each side of a level that the spatial-aware attention sees; None is the whole pyramid.
        scale_aware: apply Eq. 3.
        spatial_aware: apply Eq. 4.
        task_aware: apply Eq. 5.
        offset_groups: channel groups with separate offsets in the spatial-aware attention.
        norm_groups: groups of its GroupNorm.

    Raises:
        ValueError: an unknown ``block``; a number that is no integer or too small; groups that do not divide
            ``channels``; an option that differs from its default although ``block`` is not "paper".

    Example:
        >>> import torch
        >>> head = DyHead(64, num_blocks=2)
        >>> pyramid = {"p3": torch.randn(1, 64, 25, 42), "p4": torch.randn(1, 64, 13, 21)}
        >>> {name: tuple(level.shape) for name, level in head(pyramid).items()}
        {'p3': (1, 64, 25, 42), 'p4': (1, 64, 13, 21)}
    """

    def __init__(
        self,
        channels: int,
        num_blocks: int = 6,
        *,
        block: Literal["paper", "released", "mmdetection", "mmdetection_main"] = "paper",
        window: int | None = 1,
        scale_aware: bool = True,
        spatial_aware: bool = True,
        task_aware: bool = True,
        offset_groups: int = 1,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        channels = check_integer("channels", channels)
        num_blocks = check_integer("num_blocks", num_blocks, least=0)
        options = {
            "window": window,
            "scale_aware": scale_aware,
            "spatial_aware": spatial_aware,
            "task_aware": task_aware,
            "offset_groups": offset_groups,
            "norm_groups": norm_groups,
        }
        if block == "paper":
            blocks = [DyHeadBlock(channels, **options) for _ in range(num_blocks)]
        elif block in _COARSE_MASKS:
            changed = {name: value for name, value in options.items() if value != DyHead.__init__.__kwdefaults__[name]}
            if changed:
                given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
                raise ValueError(f"block={block!r}: expected no options, because its weights fix them all, got {given}")
            coarse_mask = _COARSE_MASKS[block]
            blocks = [ReleasedDyHeadBlock(channels, coarse_mask=coarse_mask) for _ in range(num_blocks)]
        else:
            raise ValueError(f"block: expected one of {', '.join(map(repr, BLOCKS))}, got {block!r}")
        self.channels = channels
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Args:
            pyramid: levels (N, C, H_l, W_l), each half the size of the one before it; an odd size is rounded either
                way (all blocks but "paper": up).

        Returns:
            Levels in channels_last, regardless of the input's memory format (0 blocks: the input itself), but in any
            format under torch.func's transforms.

        Raises:
            TypeError, ValueError: not a valid pyramid (no levels, wrong order, sizes, channels, ...). Names the level,
                what was expected and what came.
        """
        if len(self.blocks) > 0:
            # The operator's native layout; converted here once, if needed.
            levels = split_pyramid(pyramid, self.channels)
            pyramid = join_pyramid([to_channels_last(level) for level in levels], pyramid)
        for block in self.blocks:
            pyramid = block(pyramid)
        return pyramid
