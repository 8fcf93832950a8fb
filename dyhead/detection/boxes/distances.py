"""Boxes as distances from a point to the four sides (Tian et al., FCOS, ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.options import one_of, option


@dataclass(frozen=True)
class Distances:
    """Distances to the left, upper, right and lower side; points are the centers of anchors as large as the stride."""

    distances: str = option(
        "relu", '"relu": max(0, x) strides. "exp": exp(x) pixels, as FCOS was published first', one_of("relu", "exp")
    )
    bbox_reg_loss_type: str = option("giou", "the box loss, on decoded boxes", one_of(*OVERLAP_LOSSES))

    per_place = 4

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) from predictions and anchors, both (P, 4)."""
        if self.distances == "exp":
            sides = numbers.exp()
        else:
            sides = numbers.relu() * (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        return torch.cat([center - sides[:, :2], center + sides[:, 2:]], dim=1)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What predictions cost, (P,), from predictions, anchors and true boxes, (P, 4) each."""
        return OVERLAP_LOSSES[self.bbox_reg_loss_type](self.decode(numbers, anchors), boxes)
