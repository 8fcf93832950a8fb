"""Boxes as distances from a point to their sides, both ways."""

from __future__ import annotations

import torch
from torch import Tensor


def around(anchors: Tensor, sides: Tensor) -> Tensor:
    """Boxes (P, 4) around the centers of anchors (P, 4); ``sides`` (P, 4) as :func:`sides_of` gives them."""
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    return torch.cat([center - sides[:, :2], center + sides[:, 2:]], dim=1)


def sides_of(boxes: Tensor, points: Tensor) -> Tensor:
    """Distances (..., 4) from points (..., 2), as x, y, to the left, upper, right and lower side of boxes (..., 4).

    Negative where a point lies beyond the side. Shapes are broadcast.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def side_units(anchors: Tensor) -> Tensor:
    """Width, height, width and height of anchors (P, 4): what distances to the four sides are measured in."""
    return (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
