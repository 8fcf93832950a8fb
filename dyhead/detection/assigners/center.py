"""Assignment by the place's position and the object's size (Tian et al., FCOS, ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.detection.boxes.sides import sides_of
from dyhead.options import at_least, option

# A level of stride s is for objects of which the farthest side is 4 s to 8 s away.
_LOWEST, _HIGHEST = 4, 8


@dataclass(frozen=True)
class CenterAssigner:
    """A place belongs to an object if it lies inside its box, near its center, and on the level for its size.

    Of several objects the smallest gets it; of several smallest the first.
    """

    center_sampling_radius: float = option(
        1.5, "positive places lie within this many strides of a box's center; 0: in the whole box", at_least(0)
    )
    closed_ranges: bool = option(
        False, "whether sizes at the ends of two levels' ranges belong to both levels, or to neither"
    )

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        centers = places.centers
        if not len(boxes):
            return torch.full((len(centers),), BACKGROUND, device=centers.device)
        stride = places.by_level(places.strides)
        low = places.by_level([0 if i == 0 else _LOWEST * s for i, s in enumerate(places.strides)])
        highest = [_HIGHEST * s for s in places.strides[:-1]] + [float("inf")]
        high = places.by_level(highest)

        sides = sides_of(boxes, centers[:, None])  # (R, M, 4)
        farthest = sides.amax(dim=2)
        fits = sides.amin(dim=2) > 0
        if self.center_sampling_radius:
            away = (centers[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=2)
            fits &= away < self.center_sampling_radius * stride[:, None]
        if self.closed_ranges:
            fits &= (farthest >= low[:, None]) & (farthest <= high[:, None])
        else:
            fits &= (farthest > low[:, None]) & (farthest < high[:, None])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).expand_as(farthest)
        smallest, owner = area.masked_fill(~fits, float("inf")).min(dim=1)
        return torch.where(smallest.isfinite(), owner, torch.full_like(owner, BACKGROUND))
