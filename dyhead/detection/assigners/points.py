"""Assignment of the nearest points (Yang et al., "RepPoints", ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.options import above, option

_SMALLEST_SIDE = 1e-6  # pixels


@dataclass(frozen=True)
class PointAssigner:
    """An object has the point nearest to its center, on the one level for its size.

    That is the coarsest level on which the root of its area is at least ``point_base_scale`` strides; for smaller
    objects the finest. Distances are measured in the object's width and height; of several nearest points it is the
    first, of which mmdetection takes any. A point that several objects want belongs to the nearest of them; of several
    nearest, to the first.
    """

    point_base_scale: float = option(
        4.0, "a level is for objects of so many of its strides on; box losses are measured in as many", above(0)
    )

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        centers = places.centers
        if not len(boxes):
            return torch.full((len(centers),), BACKGROUND, device=centers.device)
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_SMALLEST_SIDE)
        smallest = (self.point_base_scale * size.new_tensor(places.strides)) ** 2
        level = ((size.prod(dim=1, keepdim=True) >= smallest).sum(dim=1) - 1).clamp(min=0)  # (M,)

        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = ((centers - middle[:, None]) / size[:, None]).norm(dim=2)  # (M, R)
        elsewhere = places.by_level(range(len(places.strides))) != level[:, None]
        value, index = distance.masked_fill(elsewhere, torch.inf).min(dim=1, keepdim=True)
        wanted = torch.full_like(distance, torch.inf).scatter_(1, index, value)
        nearest, owner = wanted.min(dim=0)
        return torch.where(nearest.isfinite(), owner, BACKGROUND)
