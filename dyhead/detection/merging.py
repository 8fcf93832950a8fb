"""Test-time augmentation: what a detector finds in several views of one image, put together."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from dyhead.detection.detector import Detections


def merge(
    boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int], nms_thresh: float, limit: int
) -> Detections:
    """The best detections of all views; NMS chooses among them as it does within one.

    Args:
        boxes: (D, 4) in pixels of the image itself, those of all views; they are cut to it.
        scores: (D,).
        labels: (D,); boxes of different ones do not displace each other.
        size: height and width of the image, in pixels.
        nms_thresh: IoU above which the worse of two boxes is dropped.
        limit: how many are kept.
    """
    boxes = clip_boxes_to_image(boxes, size)
    keep = batched_nms(boxes, scores, labels, nms_thresh)[:limit]
    return Detections(boxes[keep], scores[keep], labels[keep])
