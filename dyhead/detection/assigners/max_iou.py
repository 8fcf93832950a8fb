"""Assignment by overlap with anchors (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyhead.detection.anchors import Places
from dyhead.detection.assigners.labels import BACKGROUND, IGNORED
from dyhead.options import above, at_least_one, at_most, each, increasing, one_of, option

_MEANING = {0: BACKGROUND, -1: IGNORED}
# So many IoUs are held at a time: 2^24 of them are 64 MB.
_CHUNK = 2**24
_THRESHOLDS = at_least_one("number") & increasing() & each(above(0) & at_most(1))


@dataclass(frozen=True)
class MaxIoUAssigner:
    """Each anchor belongs to the object of its largest IoU, if that is large enough.

    Besides, every anchor whose IoU with some object is the largest of all anchors' with it is positive, so that every
    object has one unless it overlaps none; it belongs to the object of its own largest IoU, as in Detectron2.

    Raises:
        ValueError: not one label more than thresholds, or thresholds that do not increase.
    """

    iou_thresholds: tuple[float, ...] = option(
        (0.4, 0.5), "where one label of IOU_LABELS goes over into the next", _THRESHOLDS
    )
    iou_labels: tuple[int, ...] = option(
        (0, -1, 1),
        "between the thresholds: 0 background, -1 ignored, 1 object",
        each(one_of(0, -1, 1)),
    )
    #: Whether an anchor of an object's largest IoU is that object's.
    best_is_kept: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _THRESHOLDS.fits(self.iou_thresholds):
            raise ValueError(f"IOU_THRESHOLDS: expected {_THRESHOLDS.text}, got {list(self.iou_thresholds)}")
        if len(self.iou_labels) != len(self.iou_thresholds) + 1:
            raise ValueError(
                f"IOU_LABELS: expected {len(self.iou_thresholds) + 1} labels with IOU_THRESHOLDS "
                f"{list(self.iou_thresholds)}, got {list(self.iou_labels)}"
            )

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        anchors = places.anchors
        if not len(boxes):
            return torch.full((len(anchors),), _MEANING[self.iou_labels[0]], device=anchors.device)
        best, owner, wanted_by = by_overlap(anchors, boxes, _best_of_each)
        number = torch.bucketize(best, best.new_tensor(self.iou_thresholds), right=True)
        label = torch.tensor(self.iou_labels, device=anchors.device)[number]
        assigned = torch.full_like(owner, BACKGROUND)
        assigned[label == -1] = IGNORED
        wanted = wanted_by >= 0
        if self.best_is_kept:
            owner = torch.where(wanted, wanted_by, owner)
        return torch.where((label == 1) | wanted, owner, assigned)


@dataclass(frozen=True)
class BestKeptAssigner(MaxIoUAssigner):
    """The same, but an anchor of an object's largest IoU is that object's, as in mmdetection.

    So it is even if the anchor overlaps another object more; of several objects the last one has it.
    """

    best_is_kept: ClassVar[bool] = True


def _best_of_each(iou: Tensor) -> Tensor:
    largest = iou.amax(dim=1, keepdim=True)
    largest[largest == 0] = torch.inf  # of an object that overlaps no anchor all would tie
    return iou == largest


def by_overlap(
    anchors: Tensor, boxes: Tensor, wanted: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor its largest IoU, the object that it is with, and the last object that wants the anchor; (R,) each.

    Without objects the IoU is -1 and the object 0.

    Args:
        anchors: (R, 4).
        boxes: of the objects, (M, 4).
        wanted: from IoUs (some of M, R) to which anchors each of these objects wants, alike. Without one that does, the
            last result is :data:`BACKGROUND`. None: no object wants any.
    """
    best = anchors.new_full((len(anchors),), -1.0)
    owner = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    wanted_by = torch.full_like(owner, BACKGROUND)
    step = max(_CHUNK // max(len(anchors), 1), 1)
    for first in range(0, len(boxes), step):  # thousands of objects times 200,000 anchors do not fit in memory
        iou = box_iou(boxes[first : first + step], anchors)
        if wanted is not None:
            wants = wanted(iou).flip(0)
            last = first + len(iou) - 1 - wants.to(torch.uint8).argmax(dim=0)
            wanted_by = torch.where(wants.any(dim=0), last, wanted_by)
        value, index = iou.max(dim=0)
        owner = torch.where(value > best, index + first, owner)
        best = torch.maximum(value, best)
    return best, owner, wanted_by
