"""The box head of the paper's two-stage form (Fig. 2c): task-aware attention in place of fully connected layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from dyhead.detection.roi.registry import register_box_head
from dyhead.layers import TaskAwareAttention
from dyhead.layers.levels import check_integer
from dyhead.options import at_least, option


class DyHeadBoxHead(nn.Module):
    """Task-aware attention (Eq. 5) on each pooled region by itself, whose cells are then the features.

    It is the part behind RoI pooling of the paper's two-stage form (Fig. 2c); scale- and spatial-aware attention stay
    on the pyramid: ``DyHead(channels, task_aware=False)``. A region has coefficients of its own, from the average over
    its own cells. All cells are kept, as boxes depend on where something is: the predictors read C * S * S features.

    Args:
        channels: channels C of a region.
        side: cells S along each side of a region.
        num_attentions: attentions in a row.

    Attributes:
        out_features: C * S * S.

    Raises:
        ValueError: a number that is no integer or below 1, or channels that 4 does not divide.

    Example:
        >>> import torch
        >>> head = DyHeadBoxHead(64, side=7)
        >>> tuple(head(torch.randn(5, 64, 7, 7)).shape), head.out_features
        ((5, 3136), 3136)
    """

    def __init__(self, channels: int, side: int, num_attentions: int = 1) -> None:
        super().__init__()
        num_attentions = check_integer("num_attentions", num_attentions)
        self.attentions = nn.ModuleList(TaskAwareAttention(channels) for _ in range(num_attentions))
        self.out_features = channels * side**2

    def forward(self, regions: Tensor) -> Tensor:
        """Regions (Q, C, S, S) to features (Q, C * S * S), channel after channel; Q may be 0."""
        for attention in self.attentions:
            (regions,) = attention([regions])
        return regions.flatten(1)


@register_box_head("DyHeadBoxHead", "MODEL.DYHEAD_BOX_HEAD")
@dataclass(frozen=True)
class DyHeadBoxHeadOptions:
    """The box head of the paper's two-stage form (Fig. 2c), with ``MODEL.ROI_BOX_HEAD.NAME DyHeadBoxHead``.

    See :class:`dyhead.detection.roi.DyHeadBoxHead`. It takes the place of the layers that ``NUM_CONV``, ``CONV_DIM``,
    ``NORM``, ``NUM_FC`` and ``FC_DIM`` of ``MODEL.ROI_BOX_HEAD`` describe.
    """

    num_attentions: int = option(1, "task-aware attentions (Eq. 5) in a row on each pooled region", at_least(1))

    def build(self, channels: int, side: int) -> DyHeadBoxHead:
        """The module for regions (Q, channels, side, side), with random weights.

        Raises:
            ValueError: options that do not fit the channels.
        """
        return DyHeadBoxHead(channels, side, **asdict(self))
