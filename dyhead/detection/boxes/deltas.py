"""Boxes as deltas from an anchor (Girshick et al., R-CNN, CVPR 2014, appendix C)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.options import above, at_least, each, one_of, option

# A box grows at most from 16 to 1000 pixels: exp of a larger number is of no use, and overflows.
_LARGEST_LOG = math.log(1000 / 16)


@dataclass(frozen=True)
class Deltas:
    """dx, dy in units of the anchor's size, dw, dh as logarithms of ratios, each multiplied by a weight."""

    bbox_reg_weights: tuple[float, float, float, float] = option(
        (1.0, 1.0, 1.0, 1.0),
        "what dx, dy, dw and dh are multiplied by when boxes are encoded",
        each(above(0)),
    )
    bbox_reg_loss_type: str = option(
        "smooth_l1", "the box loss: on deltas, or on decoded boxes", one_of("smooth_l1", *OVERLAP_LOSSES)
    )
    smooth_l1_loss_beta: float = option(
        0.1, "where smooth L1 goes over from the square to the absolute value; 0 is plain L1", at_least(0)
    )

    per_place = 4

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (P, 4) of boxes from anchors, both (P, 4)."""
        size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
        center, anchor_center = boxes[:, :2] + size / 2, anchors[:, :2] + anchor_size / 2
        shift = (center - anchor_center) / anchor_size
        growth = torch.log(size / anchor_size)
        return torch.cat([shift, growth], dim=1) * boxes.new_tensor(self.bbox_reg_weights)

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) from deltas and anchors, both (P, 4)."""
        shift, growth = (numbers / numbers.new_tensor(self.bbox_reg_weights)).split(2, dim=1)
        anchor_size = anchors[:, 2:] - anchors[:, :2]
        center = anchors[:, :2] + anchor_size / 2 + shift * anchor_size
        half = growth.clamp(max=_LARGEST_LOG).exp() * anchor_size / 2
        return torch.cat([center - half, center + half], dim=1)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What predictions cost, (P,), from deltas, anchors and true boxes, (P, 4) each."""
        if self.bbox_reg_loss_type == "smooth_l1":
            targets = self.encode(boxes, anchors)
            return F.smooth_l1_loss(numbers, targets, reduction="none", beta=self.smooth_l1_loss_beta).sum(dim=1)
        return OVERLAP_LOSSES[self.bbox_reg_loss_type](self.decode(numbers, anchors), boxes)
