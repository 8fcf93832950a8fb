"""Masks of objects: what a head is to predict in a region, what its logits cost, and predictions on the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align


def crop_masks(masks: Tensor, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
    """What boxes see of masks: their average in each cell, aligned with the pixels, rounded to 0 or 1.

    Args:
        masks: (M, H, W) bool.
        boxes: (P, 4) in pixels.
        objects: (P,), which mask a box is to see, 0 to M - 1.
        side: cells along each side of a region.

    Returns:
        (P, side, side) bool.
    """
    regions = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1)
    cells = roi_align(masks[:, None].to(boxes.dtype), regions, side, aligned=True)
    return cells[:, 0] >= 0.5


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each object's mask of its own class, averaged over cells and objects; 0 without objects.

    Args:
        logits: (P, K, S, S), or (P, 1, S, S) for masks of no class.
        labels: (P,), 0 to K - 1.
        targets: (P, S, S) bool.
    """
    own = _of_class(logits, labels)
    total = F.binary_cross_entropy_with_logits(own, targets.to(own.dtype), reduction="sum")
    return total / max(own.numel(), 1)


def mask_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of being in the object, for each cell of its box: (D, S, S), see :func:`mask_loss`."""
    return _of_class(logits, labels).sigmoid()


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of boxes on the image: where the probability, interpolated between the cells' centers, is at least 0.5.

    Args:
        masks: probabilities (D, S, S).
        boxes: (D, 4) in pixels of the image; they may extend beyond it.
        height, width: of the image, in pixels.

    Returns:
        (D, height, width) bool.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        # Outside the box, more than half of what is interpolated is 0.
        left, top, right, bottom = (int(n) for n in (*box[:2].floor().tolist(), *box[2:].ceil().tolist()))
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if right <= left or bottom <= top or (box[2:] <= box[:2]).any():
            continue
        y = torch.arange(top, bottom, dtype=boxes.dtype, device=boxes.device) + 0.5
        x = torch.arange(left, right, dtype=boxes.dtype, device=boxes.device) + 0.5
        y, x = (y - box[1]) / (box[3] - box[1]) * 2 - 1, (x - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack([x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2)
        sampled = F.grid_sample(mask[None, None], grid[None].to(mask.dtype), align_corners=False)
        pasted[i, top:bottom, left:right] = sampled[0, 0] >= 0.5
    return pasted


def _of_class(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(logits), device=logits.device), labels]
