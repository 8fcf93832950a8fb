"""Boxes as distances from a point to the four sides (Tian et al., FCOS, ICCV 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.detection.boxes.sides import around, side_units
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
        sides = numbers.exp() if self.distances == "exp" else numbers.relu() * side_units(anchors)
        return around(anchors, sides)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What predictions cost, (P,), from predictions, anchors and true boxes, (P, 4) each."""
        return OVERLAP_LOSSES[self.bbox_reg_loss_type](self.decode(numbers, anchors), boxes)
