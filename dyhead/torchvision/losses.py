"""Losses that torchvision's detectors have with fixed parameters, here with those of the configuration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

_OVERLAP_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}


def box_loss(kind: str, coder: BoxCoder, deltas: Tensor, anchors: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Sum of the box regression losses of R anchors.

    Args:
        kind: "smooth_l1" on the deltas, or "giou", "diou" or "ciou" on the boxes.
        coder: encodes and decodes boxes.
        deltas: predictions (R, 4).
        anchors: the boxes (R, 4) that they are relative to, in pixels.
        targets: the boxes (R, 4) to be predicted, in pixels.
        beta: where smooth L1 goes over from the square to the absolute value; 0 is plain L1.
    """
    if kind == "smooth_l1":
        return F.smooth_l1_loss(deltas, coder.encode_single(targets, anchors), reduction="sum", beta=beta)
    return _OVERLAP_LOSSES[kind](coder.decode_single(deltas, anchors), targets, reduction="sum")


def average_over_devices(count: float, device: torch.device) -> float:
    """Mean of ``count`` over all processes that train together, at least 1.

    The normaliser of a dense detector's losses: with the number of positives averaged over devices, several devices
    compute the loss that one would on all their pictures.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = torch.tensor(float(count), device=device)
        torch.distributed.all_reduce(total)
        count = total.item() / torch.distributed.get_world_size()
    return max(count, 1.0)
