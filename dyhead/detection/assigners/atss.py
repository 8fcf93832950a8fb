"""Adaptive training sample selection (Zhang et al., "Bridging the Gap ...", CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.detection.boxes.sides import sides_of
from dyhead.options import at_least, option

_INSIDE = 0.01  # pixels that an anchor's center must lie within its object


@dataclass(frozen=True)
class ATSSAssigner:
    """An anchor belongs to an object if it is among the nearest and overlaps more than most of them.

    For every object the candidates are, on every level, the anchors whose centers are nearest to its own. Those whose
    IoU with it is at least the mean plus the standard deviation of all candidates' IoUs, and whose centers lie inside
    it, are its. An anchor that several objects want belongs to the one of the largest IoU.
    """

    atss_candidates: int = option(9, "candidates of an object on each level, per anchor of a cell", at_least(1))

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        anchors, centers = places.anchors, places.centers
        assigned = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
        if not len(boxes):
            return assigned
        distance = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, centers, compute_mode="donot_use_mm_for_euclid_dist")
        candidates, first = [], 0
        for count in places.counts:
            nearest = min(self.atss_candidates * places.per_cell, count)
            level = distance[:, first : first + count]
            candidates.append(level.topk(nearest, dim=1, largest=False).indices + first)
            first += count
        candidates = torch.cat(candidates, dim=1)  # (M, candidates of all levels)
        iou = box_iou(boxes, anchors).gather(1, candidates)
        # One candidate deviates from nothing: its own standard deviation would be NaN.
        deviation = iou.std(dim=1) if iou.shape[1] > 1 else torch.zeros_like(iou[:, 0])
        sides = sides_of(boxes[:, None], centers[candidates])
        fits = (iou >= (iou.mean(dim=1) + deviation)[:, None]) & (sides.amin(dim=2) > _INSIDE)

        best = anchors.new_full((len(boxes), len(anchors)), -1.0)
        best.scatter_(1, candidates, torch.where(fits, iou, -1.0))
        value, owner = best.max(dim=0)
        return torch.where(value >= 0, owner, assigned)
