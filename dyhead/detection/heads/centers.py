"""The head of SaccadeNet (Lan et al., "SaccadeNet: A Fast and Accurate Object Detector", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyhead.detection.heads.dense import DenseHead, at_least_float32, convolution, start_at
from dyhead.ops import deform_conv2d

_STEPS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
_MIDDLE = 4
_CORNERS = (0, 2, _MIDDLE, 6, 8)
#: Where boxes are looked at, see :class:`Aggregation`: which taps count, and where they are in half heights and widths.
AGGREGATIONS = {
    "nine": (tuple(range(9)), _STEPS),
    "corners": (_CORNERS, _STEPS),
    "corners_as_published": (_CORNERS, [*_STEPS[:8], (0, 1)]),
}


class Aggregation(nn.Module):
    """What is seen at certain points of a box, by one modulated deformable convolution of 3x3 taps.

    The taps are at the box's corners, the middles of its sides, and a learned position near the cell, each with a
    learned importance. After ReLU a 1x1 convolution, which is 0 at first, gives the output. The deformable one starts
    with He et al.'s uniform weights.

    Args:
        channels: channels C of the level.
        hidden: channels between the two convolutions.
        outputs: channels of the output.
        points: "nine": all of these. "corners": the corners and the learned position. "corners_as_published": as in the
            published code, where the tap of the lower right corner is in the middle of the right side.
        size_gradient: what the gradient to the size, through the positions, is multiplied by.

    Raises:
        ValueError: other ``points``.
    """

    def __init__(
        self, channels: int, hidden: int, outputs: int, points: str = "nine", size_gradient: float = 0.01
    ) -> None:
        super().__init__()
        if points not in AGGREGATIONS:
            raise ValueError(f"points: expected one of {', '.join(AGGREGATIONS)}, got {points!r}")
        taps, positions = AGGREGATIONS[points]
        self.size_gradient = size_gradient
        self.offset = nn.Conv2d(channels, 2 + len(taps), 3, padding=1)
        self.weight = nn.Parameter(torch.empty(hidden, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.predictor = nn.Conv2d(hidden, outputs, 1)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        for layer in (self.offset, self.predictor):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("taps", torch.tensor(taps), persistent=False)
        for name, steps in (("positions", positions), ("grid", _STEPS)):
            self.register_buffer(name, torch.tensor(steps, dtype=torch.float32).view(9, 2, 1, 1), persistent=False)

    def forward(self, level: Tensor, size: Tensor) -> Tensor:
        """The output (N, ``outputs``, H, W) of a level (N, C, H, W).

        Args:
            level: what is read.
            size: (N, 2, H, W), at every cell the width and height of a box around it, in cells.
        """
        fixed = size.detach()
        size = fixed + self.size_gradient * (size - fixed)
        middle, importance = at_least_float32(self.offset(level)).split([2, len(self.taps)], dim=1)
        positions = size.flip(1)[:, None] / 2 * self.positions  # (N, 9, 2, H, W) as y, x
        positions = torch.cat([positions[:, :_MIDDLE], middle[:, None], positions[:, _MIDDLE + 1 :]], dim=1)
        mask = importance.new_zeros(len(level), 9, *level.shape[-2:]).index_copy(1, self.taps, importance.sigmoid())
        offset = (positions - self.grid).flatten(1, 2)
        return self.predictor(deform_conv2d(level, offset, self.weight, self.bias, padding=1, mask=mask).relu())


class CenterHead(DenseHead):
    """Class logits, a center and a size at every cell, and a size that is refined by what is seen around the box.

    The towers are those of :class:`DenseHead`. Before each predictor stand a 3x3 convolution of its own and ReLU:
    ``class_conv`` before ``logits``, ``box_conv`` before ``deltas`` (the sizes), ``center_conv`` before ``centers``,
    ``corner_conv`` before ``corners``. What ``aggregation`` makes of a level and the sizes is added to the sizes, which
    it gives no gradient but through the positions that it reads. All but classes are predicted from the box tower.

    What stands before predictors starts with He et al.'s uniform weights: with a deviation of 0.01, as all else in a
    head, so little would come through two layers that little is learned at first.

    Args:
        channels: channels C of every level.
        num_classes: classes K, without background.
        hidden: channels before the predictors.
        points, size_gradient: as for :class:`Aggregation`.
        refine_center: refine the center in the same way.
        num_levels, num_convs, norm, norm_groups, kernel_size, prior_prob: as for :class:`DenseHead`. Corners start at
            the same probability as classes.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> head = CenterHead(64, num_classes=3, hidden=32)
        >>> logits, numbers, quality = head([torch.randn(2, 64, 8, 8)])
        >>> tuple(logits[0].shape), tuple(numbers[0].shape), quality
        ((2, 3, 8, 8), (2, 10, 8, 8), None)
        >>> tuple(head.eval()([torch.randn(2, 64, 8, 8)])[1][0].shape)
        (2, 6, 8, 8)
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 256,
        points: str = "nine",
        size_gradient: float = 0.01,
        refine_center: bool = False,
        num_levels: int = 1,
        num_convs: int = 0,
        norm: str = "",
        norm_groups: int = 32,
        kernel_size: int = 1,
        prior_prob: float = 0.1,
    ) -> None:
        super().__init__(
            channels,
            num_classes,
            num_levels=num_levels,
            num_convs=num_convs,
            norm=norm,
            norm_groups=norm_groups,
            kernel_size=kernel_size,
            prior_prob=prior_prob,
            box_numbers=2,
            predictor_channels=hidden,
        )
        self.refine_center = refine_center
        self.class_conv, self.box_conv, self.center_conv, self.corner_conv = (
            convolution(channels, hidden, 3) for _ in range(4)
        )
        for layer in (self.class_conv, self.box_conv, self.center_conv, self.corner_conv):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        self.centers = convolution(hidden, 2, kernel_size)
        self.corners = convolution(hidden, 4, kernel_size)
        start_at(self.corners, prior_prob)
        self.aggregation = Aggregation(channels, hidden, 4 if refine_center else 2, points, size_gradient)

    def forward(self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor], None]:
        """Predictions of each level (N, C, H, W), or pair of such, in float32 at least.

        Returns:
            Class logits (N, K, H, W); the numbers of :class:`dyhead.detection.boxes.Centers`, in training followed by
            the logits of four corners (upper left, upper right, lower left, lower right), (N, X, H, W): lists over
            levels. There is no quality.

        Raises:
            ValueError: not ``num_levels`` levels, where they differ in a norm.
        """
        self.check(levels)
        logits, numbers = [], []
        for i, level in enumerate(levels):
            of_class, of_box = self.towers(level, i)
            logits.append(at_least_float32(self.logits(self.class_conv(of_class).relu())))
            center = at_least_float32(self.centers(self.center_conv(of_box).relu()))
            size = at_least_float32(self.deltas(self.box_conv(of_box).relu()))
            more = at_least_float32(self.aggregation(of_box, size))
            parts = [center, size, size.detach() + more[:, :2]]
            if self.refine_center:
                parts.append(center.detach() + more[:, 2:])
            if self.training:
                parts.append(at_least_float32(self.corners(self.corner_conv(of_box).relu())))
            numbers.append(torch.cat(parts, dim=1))
        return logits, numbers, None
