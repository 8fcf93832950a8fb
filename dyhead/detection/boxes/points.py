"""Boxes around points (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.detection.boxes.sides import around, side_units

#: Ways to a box from points: see :class:`Points`.
KINDS = ("moment", "minmax", "partial_minmax")
_PARTIAL = 4  # points of "partial_minmax"


class Points(nn.Module):
    """Two sets of points, first and refined, as boxes around them; the refined ones' box is the prediction.

    The numbers of a place are y and x of one point after the other, those of the first set before those of the refined
    one, in cells from the place, whose anchor is a square as large as the stride.

    Args:
        num_points: points of a set.
        kind: "moment": the points' mean is the center, and half the size is their standard deviation (of a sample, the
            divisor is one less than the points) times the exponential of a learned number, ``log_scale``, one for
            widths and one for heights, for both sets. "minmax": the outermost points are on the sides.
            "partial_minmax": of the first four points.
        scale_gradient: what the gradient of these two learned numbers is multiplied by.
        beta: where smooth L1 goes over from the square to the absolute value.
        unit: strides that box losses are measured in.

    Raises:
        ValueError: another kind, or fewer points than it needs.
    """

    def __init__(
        self,
        num_points: int = 9,
        kind: str = "moment",
        *,
        scale_gradient: float = 0.01,
        beta: float = 0.11,
        unit: float = 4.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        least = {"moment": 2, "minmax": 1, "partial_minmax": _PARTIAL}[kind]
        if num_points < least:
            raise ValueError(f"num_points: expected at least {least} with {kind}, got {num_points}")
        self.kind, self.beta, self.unit = kind, beta, unit
        self.scale_gradient = scale_gradient
        self.per_place = 4 * num_points
        self.log_scale = nn.Parameter(torch.zeros(2)) if kind == "moment" else None

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) of the refined points, from predictions (P, 4 * num_points) and anchors (P, 4)."""
        return self._around(numbers[:, self.per_place // 2 :], anchors)

    def decode_first(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Those of the first points."""
        return self._around(numbers[:, : self.per_place // 2], anchors)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What refined points cost, (P,): smooth L1 of their boxes' sides in units of ``unit`` strides."""
        return self._cost(self.decode(numbers, anchors), anchors, boxes)

    def loss_first(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What first points cost, likewise."""
        return self._cost(self.decode_first(numbers, anchors), anchors, boxes)

    def _around(self, points: Tensor, anchors: Tensor) -> Tensor:
        points = points.unflatten(1, (-1, 2)).flip(2)  # (P, num_points, 2) as x, y
        if self.kind == "moment":
            fixed = self.log_scale.detach()
            scale = fixed + self.scale_gradient * (self.log_scale - fixed)
            middle = points.mean(dim=1)
            # Not std: it warns where there are no places. Points that all lie on their mean have gradient 0.
            deviation = torch.linalg.vector_norm(points - middle[:, None], dim=1) / math.sqrt(points.shape[1] - 1)
            half = deviation * scale.exp()
            low, high = middle - half, middle + half
        else:
            if self.kind == "partial_minmax":
                points = points[:, :_PARTIAL]
            low, high = points.amin(dim=1), points.amax(dim=1)
        return around(anchors, torch.cat([-low, high], dim=1) * side_units(anchors))

    def _cost(self, predicted: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        unit = self.unit * side_units(anchors)
        return F.smooth_l1_loss(predicted / unit, boxes / unit, reduction="none", beta=self.beta).sum(dim=1)
