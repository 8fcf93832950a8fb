"""The Dynamic Head (Dai et al., CVPR 2021) as a neck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dyhead.layers import DyHead
from dyhead.layers.head import BLOCKS
from dyhead.necks.registry import register_neck
from dyhead.options import at_least, one_of, option


@register_neck("DyHead")
@dataclass(frozen=True)
class DyHeadOptions:
    """The Dynamic Head as a neck, where ``MODEL.NECKS`` lists it; see :class:`dyhead.layers.DyHead`."""

    num_blocks: int = option(
        6, "blocks stacked on the pyramid; the paper's best trade is 6. 0 leaves the pyramid as it is", at_least(0)
    )
    block: str = option(
        "paper",
        "paper: Eqs. 3 to 5 in the pyramid's own geometry. released (or mmdetection): the block of the published "
        "weights; images are then padded to multiples of the last stride, as theirs were. mmdetection_main: that of "
        "weights trained with mmdetection's main branch after 3.3",
        one_of(*BLOCKS),
    )
    window: int | None = option(
        1,
        "levels on each side of a level that Eq. 4 sums over; null is the whole pyramid",
        at_least(1),
    )
    scale_aware: bool = option(True, "apply Eq. 3, the scale-aware attention")
    spatial_aware: bool = option(True, "apply Eq. 4, the spatial-aware attention")
    task_aware: bool = option(True, "apply Eq. 5, the task-aware attention")
    offset_groups: int = option(1, "groups of channels with offsets of their own in Eq. 4", at_least(1))
    norm: str = option(
        "GN",
        "after Eq. 4: GN; BN has one set of statistics for all levels together, and wants several images on a device; "
        "SyncBN also for all devices; empty: none",
        one_of("GN", "BN", "SyncBN", ""),
    )
    norm_groups: int = option(16, "groups of the spatial-aware attention's GroupNorm", at_least(1))
    zero_init_offset: bool = option(
        True, "start the offsets of Eq. 4 at zero; otherwise small and random, as microsoft/DynamicHead does"
    )
    shortcut: bool = option(
        False,
        "add each block's input to its output, as the paper does not: for a box head with fully connected layers "
        "behind the blocks, which otherwise learns classes late",
    )
    use_checkpoint: bool = option(
        False,
        "compute each block again in the backward pass: memory for one block instead of all, for one more forward pass "
        "of them",
    )

    def build(self, channels: int, num_levels: int | None = None) -> DyHead:
        """The module, with random weights, for any number of levels.

        Raises:
            ValueError: options that do not fit each other or the channels.
        """
        return DyHead(channels, **asdict(self) | {"norm": self.norm or None})

    def size_divisibility(self, strides: Sequence[int]) -> int:
        """What it asks of the image's height and width, in pixels."""
        return 1 if self.block == "paper" or not self.num_blocks else max(strides)
