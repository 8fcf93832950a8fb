"""Assignment to each object of its best anchors (Li et al., "Learning From Noisy Anchors ...", CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.detection.assigners.max_iou import by_overlap
from dyhead.options import at_least, option


@dataclass(frozen=True)
class TopIoUAssigner:
    """The anchors of largest IoU with an object are positive, however small it is; anchors that miss it are not.

    A positive anchor belongs to the object of its own largest IoU, which need not be the one that it is a best of.
    Nothing is ignored.
    """

    top_anchors: int = option(30, "so many anchors of largest IoU of every object are positive", at_least(1))

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        _, owner, wanted_by = by_overlap(places.anchors, boxes, self._best)
        return torch.where(wanted_by >= 0, owner, torch.full_like(owner, BACKGROUND))

    def _best(self, iou: Tensor) -> Tensor:
        largest, index = iou.topk(min(self.top_anchors, iou.shape[1]), dim=1)
        return torch.zeros_like(iou, dtype=torch.bool).scatter(1, index, largest > 0)
