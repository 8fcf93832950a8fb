"""Coarse boxes and what refines them (Qiu et al., "BorderDet", ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dyhead.detection.boxes.distances import Distances
from dyhead.detection.boxes.sides import side_units
from dyhead.options import above, at_least, inherited, option


@dataclass(frozen=True)
class Borders:
    """A coarse box, as distances from a point, and how far each of its sides is to be moved.

    The numbers of a place are the four distances in strides, of which negative ones count as 0, and the shifts of x0,
    y0, x1, y1 in units of ``border_delta_std`` times the coarse box's width or height. What shifts say and cost has no
    gradient to the coarse box.
    """

    bbox_reg_loss_type: str = inherited(Distances, "bbox_reg_loss_type", "giou")
    border_delta_std: float = option(
        0.5, "what the sides of a coarse box are shifted in, in its widths and heights", above(0)
    )
    border_smooth_l1_loss_beta: float = option(
        0.0,
        "where the loss of these shifts, smooth L1, goes over from the square to the absolute value; 0 is plain L1",
        at_least(0),
    )

    per_place = 8

    @property
    def coarse(self) -> Distances:
        """What the first four numbers are."""
        return Distances("relu", self.bbox_reg_loss_type)

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Refined boxes (P, 4), from predictions (P, 8) and anchors (P, 4)."""
        coarse = self.decode_coarse(numbers, anchors).detach()
        return coarse + numbers[:, 4:] * self._unit(coarse)

    def decode_coarse(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Coarse boxes likewise."""
        return self.coarse.decode(numbers[:, :4], anchors)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What the shifts cost, (P,): the sum of four, from predictions (P, 8), anchors and true boxes, (P, 4) each.

        Coarse boxes must not be empty.
        """
        coarse = self.decode_coarse(numbers, anchors).detach()
        targets = (boxes - coarse) / self._unit(coarse)
        beta = self.border_smooth_l1_loss_beta
        return F.smooth_l1_loss(numbers[:, 4:], targets, reduction="none", beta=beta).sum(dim=1)

    def _unit(self, coarse: Tensor) -> Tensor:
        """What a shift of 1 is, in pixels, (P, 4)."""
        return self.border_delta_std * side_units(coarse)
