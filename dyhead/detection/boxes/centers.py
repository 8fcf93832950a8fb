"""Boxes as a center and a size, both in two steps (Lan et al., "SaccadeNet", CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.boxes.sides import around, side_units, sides_of


@dataclass(frozen=True)
class Centers:
    """The center as an offset from the place, and width and height: first ones, and a size that is refined.

    The numbers of a place are x and y of the center, width and height, refined width and height and, where centers are
    refined, too, x and y of the refined one. All are in strides, the sides of the anchors. Nothing keeps a size
    from being negative; such a box is empty. What the head says beyond these numbers is not read.

    Args:
        refined: whether centers are.
    """

    refined: bool = False

    @property
    def per_place(self) -> int:
        """How many numbers these are."""
        return 8 if self.refined else 6

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) of refined sizes, from predictions (P, X) and anchors (P, 4)."""
        center, half = numbers[:, 6:8] if self.refined else numbers[:, :2], numbers[:, 4:6] / 2
        return around(anchors, torch.cat([half - center, half + center], dim=1) * side_units(anchors))

    def costs(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """The mean absolute error, in strides, of each two numbers, (P, 3) or (P, 4): in their order."""
        before, after = (sides_of(boxes, (anchors[:, :2] + anchors[:, 2:]) / 2) / side_units(anchors)).chunk(2, dim=1)
        center, size = (after - before) / 2, before + after
        want = torch.cat([center, size, size, center], dim=1)[:, : self.per_place]
        return (numbers[:, : self.per_place] - want).abs().unflatten(1, (-1, 2)).mean(dim=2)
