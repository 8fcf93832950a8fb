"""Keypoints of objects as heatmaps of their regions: the cell that is to be the highest, the loss, and back.

A keypoint is (x, y, visibility) in pixels of the image, where the center of the first pixel is (0.5, 0.5); visibility 0
is one that is not annotated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def keypoint_loss(logits: Tensor, boxes: Tensor, keypoints: Tensor, divisor: float | None = None) -> Tensor:
    """Cross-entropy of the cells of each keypoint's heatmap; keypoints outside their box do not count.

    Args:
        logits: (P, J, S, S).
        boxes: (P, 4) in pixels.
        keypoints: (P, J, 3) of the objects that the boxes belong to.
        divisor: what the sum is divided by; None: the number of keypoints that count.
    """
    cells, counts = _cells(boxes, keypoints, logits.shape[-1])
    chosen = logits.flatten(2)[counts]
    total = F.cross_entropy(chosen, cells[counts], reduction="sum")
    # All logits, so that they have a gradient where none counts.
    return total / (max(len(chosen), 1) if divisor is None else divisor) + 0 * logits.sum()


@torch.no_grad()
def find_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """The highest points of heatmaps that are interpolated to the pixels of their boxes; they have no gradient.

    Args:
        logits: (D, J, S, S).
        boxes: (D, 4) in pixels.

    Returns:
        (D, J, 3): x, y in pixels, and the score: the point's part of the sum of exponentials over the S * S cells.
    """
    found = logits.new_zeros(len(logits), logits.shape[1], 3)
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for i, (own, box, size) in enumerate(zip(logits, boxes, sizes, strict=True)):
        width, height = (int(n) for n in size.ceil().tolist())
        fine = F.interpolate(own[None], size=(height, width), mode="bicubic", align_corners=False)[0].flatten(1)
        highest, place = fine.max(dim=1)
        found[i, :, 0] = box[0] + (place % width + 0.5) * (size[0] / width)
        found[i, :, 1] = box[1] + (place // width + 0.5) * (size[1] / height)
        found[i, :, 2] = 1 / (own.flatten(1) - highest[:, None]).exp().sum(dim=1)
    return found


def _cells(boxes: Tensor, keypoints: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell (P, J) of each keypoint, row by row, and whether it counts: annotated, and in its box."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    points = keypoints[..., :2]
    cells = ((points - low) * (side / (high - low))).floor().long()
    cells = torch.where(points == high, side - 1, cells)  # at the far border, the last one
    counts = ((cells >= 0) & (cells < side)).all(dim=2) & (keypoints[..., 2] > 0)
    return (cells[..., 1] * side + cells[..., 0]) * counts, counts
