"""NMS by representative regions, R2NMS (Huang et al., CVPR 2020): duplicates are told by what is visible of objects."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import batched_nms


def r2nms(visible: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """Greedy NMS in which boxes overlap as much as their visible parts do.

    Of two people in a crowd the whole boxes overlap much, and the visible parts little; of two detections of one person
    both do. It goes with any detector of two boxes of an object; the whole boxes of what is kept are the detections.

    Args:
        visible: boxes (D, 4) of the visible parts.
        scores: (D,).
        labels: (D,). Objects of different classes do not compete.
        iou_threshold: of two whose IoU is larger, the one of the lower score is dropped.

    Returns:
        The indices of those that are kept, by falling score.

    Example:
        >>> import torch
        >>> from dyhead.detection import r2nms
        >>> visible = torch.tensor([[0.0, 0, 10, 30], [12, 0, 30, 30], [13, 0, 30, 30]])
        >>> r2nms(visible, torch.tensor([0.9, 0.7, 0.8]), torch.tensor([0, 0, 0]))
        tensor([0, 2])
    """
    # To keep classes apart, batched_nms moves each by the largest coordinate: none may be negative.
    lowest = visible.min() if visible.numel() else 0
    return batched_nms(visible - lowest, scores, labels, iou_threshold)
