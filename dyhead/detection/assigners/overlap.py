"""Assignment of predicted boxes by what they overlap (Qiu et al., "BorderDet", ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.detection.assigners.max_iou import by_overlap
from dyhead.options import above, at_most, option


@dataclass(frozen=True)
class OverlapAssigner:
    """A box belongs to the object of its largest IoU, if that is large enough; else to none.

    An object that no box overlaps enough has none. Nothing is ignored.
    """

    border_iou_threshold: float = option(
        0.6, "a coarse box is refined towards the object that it overlaps with at least this IoU", above(0) & at_most(1)
    )

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        best, owner, _ = by_overlap(places.anchors, boxes)
        return torch.where(best >= self.border_iou_threshold, owner, BACKGROUND)
