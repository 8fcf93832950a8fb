"""Losses of boxes against boxes, one number per pair."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

_SMALLEST_IOU = 1e-6
_SMALLEST_AREA = 1e-6  # square pixels
_SMALLEST_SIDE = 1e-3  # pixels


def log_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """``-log IoU`` (Yu et al., "UnitBox", 2016), for an IoU of at least 1e-6; (P,) from boxes (P, 4)."""
    return -iou(boxes, targets).clamp(min=_SMALLEST_IOU).log()


def iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Of each box with its target, (P,) from boxes (P, 4); 0 where both are empty."""
    low, high = torch.max(boxes[:, :2], targets[:, :2]), torch.min(boxes[:, 2:], targets[:, 2:])
    overlap = (high - low).clamp(min=0).prod(dim=1)
    areas = [(b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, targets)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=_SMALLEST_AREA)


def complete_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """``1 - CIoU`` (Zheng et al., "Distance-IoU Loss", AAAI 2020), also of empty boxes; (P,) from boxes (P, 4)."""
    # The aspect ratio of a box without height would be NaN, or have a gradient that is.
    corner = torch.maximum(boxes[:, 2:], boxes[:, :2] + _SMALLEST_SIDE)
    return complete_box_iou_loss(torch.cat([boxes[:, :2], corner], dim=1), targets)


#: Losses on decoded boxes by their names in the configuration, (P, 4) and (P, 4) to (P,).
OVERLAP_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": log_iou_loss,
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_iou_loss,
}
