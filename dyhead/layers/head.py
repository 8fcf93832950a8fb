"""The Dynamic Head: a stack of blocks on a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dyhead.layers.adapters import PyramidAdapter
from dyhead.layers.block import DyHeadBlock
from dyhead.layers.levels import Pyramid, check_integer, join_pyramid, split_pyramid, to_channels_last
from dyhead.layers.released import ReleasedDyHeadBlock
from dyhead.ops.checks import describe, is_list

Widths = int | list[int]

# How the published blocks read the importances of their coarser branch.
_COARSE_MASKS = {"released": "flat", "mmdetection": "flat", "mmdetection_main": "corner"}

#: The blocks that :class:`DyHead` can stack.
BLOCKS = ("paper", *_COARSE_MASKS)


class DyHead(nn.Module):
    """Dynamic Head (Dai et al., CVPR 2021): ``num_blocks`` blocks that map a feature pyramid to one of the same sizes.

    Args:
        channels: channels C of every level in the blocks. By default ``out_channels``, or ``in_channels`` without it,
            if that is one number.
        num_blocks: how many blocks are stacked; the paper's best trade is 6. 0 is the identity.
        in_channels: channels of the levels that come in: a number for each level, or one for all; by default C. Levels
            of another width than C go through a 1x1 convolution (:class:`PyramidAdapter`).
        out_channels: likewise of the levels that go out.
        block: "paper" is :class:`DyHeadBlock`. "released" is :class:`ReleasedDyHeadBlock`, the block of all published
            weights of microsoft/DynamicHead and mmdetection (``dyhead convert`` renames their keys); "mmdetection" is
            another name for it. "mmdetection_main" is the same with ``coarse_mask="corner"``, for weights that were
            trained with mmdetection's main branch after release 3.3. ``shortcut`` and the options from ``window`` to
            ``norm_groups`` apply to "paper" alone.
        window: levels on each side of a level that the spatial-aware attention sees; None is the whole pyramid.
        scale_aware: apply Eq. 3.
        spatial_aware: apply Eq. 4.
        task_aware: apply Eq. 5.
        offset_groups: channel groups with separate offsets in the spatial-aware attention.
        norm: its normalisation: "GN", a GroupNorm; "BN", a BatchNorm2d, whose statistics are those of all levels and
            images together; "SyncBN", and of all devices; None, none.
        norm_groups: groups of its GroupNorm.
        zero_init_offset: start its offset convolution at zero, so that sampling starts as a convolution; otherwise with
            small random weights.
        shortcut: add each block's input to its output. The paper does not, and ATSS did better without; a box head
            with fully connected layers behind the blocks learned classes late without (docs/evidence.md).
        use_checkpoint: compute each block again in the backward pass instead of keeping what it computed: memory for
            one block instead of all, for the time of one more forward pass.

    Raises:
        ValueError: an unknown ``block`` or ``norm``; a number that is no integer or too small; groups that do not
            divide C; widths that leave C open; lists of widths of different lengths; an option that differs from its
            default although ``block`` is not "paper"; ``use_checkpoint`` with BN, whose statistics would count twice.

    Attributes:
        channels, in_channels, out_channels: the arguments, or what they are by default.

    Example:
        >>> import torch
        >>> head = DyHead(64, num_blocks=2)
        >>> pyramid = {"p3": torch.randn(1, 64, 25, 42), "p4": torch.randn(1, 64, 13, 21)}
        >>> {name: tuple(level.shape) for name, level in head(pyramid).items()}
        {'p3': (1, 64, 25, 42), 'p4': (1, 64, 13, 21)}
        >>> head = DyHead(in_channels=[32, 64, 128], out_channels=64, num_blocks=2, norm="BN")
        >>> levels = [torch.randn(2, 32, 20, 20), torch.randn(2, 64, 10, 10), torch.randn(2, 128, 5, 5)]
        >>> [tuple(level.shape) for level in head(levels)]
        [(2, 64, 20, 20), (2, 64, 10, 10), (2, 64, 5, 5)]
    """

    def __init__(
        self,
        channels: int | None = None,
        num_blocks: int = 6,
        *,
        in_channels: int | Sequence[int] | None = None,
        out_channels: int | Sequence[int] | None = None,
        block: Literal["paper", "released", "mmdetection", "mmdetection_main"] = "paper",
        window: int | None = 1,
        scale_aware: bool = True,
        spatial_aware: bool = True,
        task_aware: bool = True,
        offset_groups: int = 1,
        norm: Literal["GN", "BN", "SyncBN"] | None = "GN",
        norm_groups: int = 16,
        zero_init_offset: bool = True,
        shortcut: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        channels, in_channels, out_channels = _widths(channels, in_channels, out_channels)
        num_blocks = check_integer("num_blocks", num_blocks, least=0)
        if use_checkpoint and norm == "BN":
            raise ValueError(
                "use_checkpoint: expected norm='GN' or None, as BN's statistics would count twice, got 'BN'"
            )
        options = {
            "window": window,
            "scale_aware": scale_aware,
            "spatial_aware": spatial_aware,
            "task_aware": task_aware,
            "offset_groups": offset_groups,
            "norm": norm,
            "norm_groups": norm_groups,
            "shortcut": shortcut,
        }
        if block == "paper":
            make = partial(DyHeadBlock, **options)
        elif block in _COARSE_MASKS:
            changed = {name: value for name, value in options.items() if value != DyHead.__init__.__kwdefaults__[name]}
            if changed:
                given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
                raise ValueError(f"block={block!r}: expected no options, because its weights fix them all, got {given}")
            make = partial(ReleasedDyHeadBlock, coarse_mask=_COARSE_MASKS[block])
        else:
            raise ValueError(f"block: expected one of {', '.join(map(repr, BLOCKS))}, got {block!r}")
        self.channels, self.in_channels, self.out_channels = channels, in_channels, out_channels
        self.use_checkpoint = use_checkpoint
        self.adapt_in = None if in_channels == channels else PyramidAdapter(in_channels, channels)
        self.blocks = nn.ModuleList(make(channels, zero_init_offset=zero_init_offset) for _ in range(num_blocks))
        self.adapt_out = None if out_channels == channels else PyramidAdapter(channels, out_channels)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and sizes.

        Args:
            pyramid: levels (N, C_l, H_l, W_l). A level is no larger than the one before it, and its height and width
                have one ratio to that one's. Halves, rounded either way, have twice the stride; other sizes are taken
                for the nearest whole ratio of strides that explains them to a pixel, or for maps of the same part of
                the image. All blocks but "paper" take halves only, rounded up.

        Returns:
            Levels in channels_last, regardless of the input's memory format (0 blocks: the input itself), but in any
            format under torch.func's transforms.

        Raises:
            TypeError, ValueError: not a valid pyramid (no levels, wrong order, sizes, channels, ...). Names the level,
                what was expected and what came.
        """
        if self.adapt_in is not None:
            pyramid = self.adapt_in(pyramid)
        if len(self.blocks) > 0:
            # The operator's native layout; converted here once, if needed.
            levels = split_pyramid(pyramid, self.channels, halved=False)
            pyramid = join_pyramid([to_channels_last(level) for level in levels], pyramid)
        for block in self.blocks:
            if torch.jit.is_scripting():
                pyramid = block(pyramid)
            elif self.use_checkpoint and torch.is_grad_enabled():
                pyramid = checkpoint(block, pyramid, use_reentrant=False)
            else:
                pyramid = block(pyramid)
        if self.adapt_out is not None:
            pyramid = self.adapt_out(pyramid)
        return pyramid


def _widths(channels: object, in_channels: object, out_channels: object) -> tuple[int, Widths, Widths]:
    """The three, checked, with their defaults."""
    ins, outs = _width("in_channels", in_channels), _width("out_channels", out_channels)
    if channels is None:
        given = ins if outs is None else outs
        channels = given[0] if isinstance(given, list) and len(set(given)) == 1 else given
        if not isinstance(channels, int):
            raise ValueError(
                "channels: expected the width of the blocks, as levels have no common one, got none beside "
                f"in_channels={describe(in_channels)} and out_channels={describe(out_channels)}"
            )
    channels = check_integer("channels", channels)
    ins, outs = channels if ins is None else ins, channels if outs is None else outs
    if isinstance(ins, list) and isinstance(outs, list) and len(ins) != len(outs):
        raise ValueError(f"out_channels: expected {len(ins)} widths, as in_channels has, got {len(outs)}")
    return channels, ins, outs


def _width(name: str, value: object) -> Widths | None:
    if value is None:
        return None
    if not is_list(value):
        return check_integer(name, value)
    widths = [check_integer(f"{name}[{i}]", width) for i, width in enumerate(value)]
    if not widths:
        raise ValueError(f"{name}: expected a width for each level, got none")
    return widths
