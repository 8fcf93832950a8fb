"""The head of RepPoints (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyhead.detection.heads.dense import DenseHead, at_least_float32, convolution
from dyhead.ops import deform_conv2d


class PointHead(DenseHead):
    """Class logits and two sets of points at every cell: the first, and one refined by what is seen at the first.

    The towers are those of :class:`DenseHead`. The first points come from the box tower, by a 3x3 convolution, ReLU and
    a predictor. At them, two deformable convolutions read the towers, and after ReLU the predictors ``logits`` and
    ``deltas`` give the classes, and what is added to the first points to refine them.

    Args:
        channels: channels C of every level.
        num_classes: classes K, without background.
        num_points: points of a set, the square of an odd number.
        points_gradient: what the gradient is multiplied by that goes through the deformable convolutions' positions
            to the first points.
        num_levels, num_convs, norm, norm_groups, kernel_size, prior_prob: as for :class:`DenseHead`. The predictors are
            those after the deformable convolutions, and that of the first points.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> head = PointHead(64, num_classes=3)
        >>> logits, points, quality = head([torch.randn(2, 64, 8, 8)])
        >>> tuple(logits[0].shape), tuple(points[0].shape), quality
        ((2, 3, 8, 8), (2, 36, 8, 8), None)
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        num_points: int = 9,
        points_gradient: float = 0.1,
        num_levels: int = 1,
        num_convs: int = 0,
        norm: str = "",
        norm_groups: int = 32,
        kernel_size: int = 1,
        prior_prob: float = 0.01,
    ) -> None:
        side = math.isqrt(max(num_points, 0))
        if side * side != num_points or side % 2 == 0:
            raise ValueError(f"num_points: expected the square of an odd number, got {num_points}")
        super().__init__(
            channels,
            num_classes,
            num_levels=num_levels,
            num_convs=num_convs,
            norm=norm,
            norm_groups=norm_groups,
            kernel_size=kernel_size,
            prior_prob=prior_prob,
            box_numbers=2 * num_points,
        )
        self.points_gradient = points_gradient
        self.first_conv = convolution(channels, channels, 3)
        self.first_points = convolution(channels, 2 * num_points, kernel_size)
        self.class_conv, self.box_conv = _PointConv(channels, side), _PointConv(channels, side)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], None]:
        """Predictions of each level (N, C, H, W), in float32 at least.

        Returns:
            Class logits (N, K, H, W), and the first and the refined points (N, 2 * 2 * num_points, H, W), y and x of
            one point after the other, in cells from the cell's own place: lists over levels. There is no quality.

        Raises:
            ValueError: not ``num_levels`` levels, where they differ in a norm.
        """
        self.check(levels)
        logits, points = [], []
        for i, level in enumerate(levels):
            of_class, of_box = self.towers(level, i)
            first = at_least_float32(self.first_points(self.first_conv(of_box).relu()))
            fixed = first.detach()
            where = fixed + self.points_gradient * (first - fixed)
            logits.append(at_least_float32(self.logits(self.class_conv(of_class, where).relu())))
            refined = fixed + at_least_float32(self.deltas(self.box_conv(of_box, where).relu()))
            points.append(torch.cat([first, refined], dim=1))
        return logits, points, None


class _PointConv(nn.Module):
    """A convolution that reads its input at points (N, 2 * side**2, H, W) instead of on a grid around each cell.

    It starts with He et al.'s uniform weights, as in mmdetection 3. In the authors' code it starts at a deviation of
    0.01, as the head's other convolutions do: so little then goes through it that classes are learned much later.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, side, side))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        steps = torch.arange(side) - side // 2
        grid = torch.cartesian_prod(steps, steps)  # y and x of one tap after the other
        self.register_buffer("grid", grid.reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, points: Tensor) -> Tensor:
        return deform_conv2d(x, points - self.grid, self.weight, padding=self.weight.shape[-1] // 2)
