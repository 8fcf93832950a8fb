"""Boxes as distributions of the distances from a point to the four sides (Li et al., NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.detection.boxes.sides import around, side_units, sides_of
from dyhead.options import at_least, one_of, option

# Targets of the distribution lie so far below its last distance, in strides.
_BELOW_LAST = 0.1


@dataclass(frozen=True)
class Distribution:
    """Logits of the distances 0, 1, ..., n strides to the left, upper, right and lower side, n + 1 after n + 1.

    A distance is the expectation of its distribution, so that no side is farther than n strides from its point. Points
    are the centers of anchors as large as the stride.
    """

    reg_max: int = option(16, "n, the largest distance from a point to a side of its box, in strides", at_least(1))
    bbox_reg_loss_type: str = option("giou", "the box loss, on decoded boxes", one_of(*OVERLAP_LOSSES))

    @property
    def per_place(self) -> int:
        """Logits of a place."""
        return 4 * (self.reg_max + 1)

    def distances(self, numbers: Tensor) -> Tensor:
        """What the logits are of, (n + 1,), in strides; dtype and device are those of ``numbers``."""
        return torch.arange(self.reg_max + 1, dtype=numbers.dtype, device=numbers.device)

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4) from logits (P, 4 (n + 1)) and anchors (P, 4)."""
        sides = (self._by_side(numbers).softmax(dim=2) * self.distances(numbers)).sum(dim=2)
        return around(anchors, sides * side_units(anchors))

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What decoded predictions cost, (P,), from logits (P, 4 (n + 1)), anchors and true boxes, (P, 4) each."""
        return OVERLAP_LOSSES[self.bbox_reg_loss_type](self.decode(numbers, anchors), boxes)

    def focal_loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Distribution focal loss, the mean of the four sides, (P,); arguments as those of :meth:`loss`.

        For a true distance d from i to i + 1 it is ``-((i + 1 - d) log P_i + (d - i) log P_{i+1})``, least where
        P_i = i + 1 - d and P_{i+1} = d - i. Distances that the distribution does not reach count as n - 0.1.
        """
        center = (anchors[:, :2] + anchors[:, 2:]) / 2
        sides = (sides_of(boxes, center) / side_units(anchors)).clamp(min=0, max=self.reg_max - _BELOW_LAST)
        below = sides.floor()
        share = torch.stack([below + 1 - sides, sides - below], dim=2)
        places = torch.stack([below, below + 1], dim=2).long()
        return -(share * self._by_side(numbers).log_softmax(dim=2).gather(2, places)).sum(dim=2).mean(dim=1)

    def _by_side(self, numbers: Tensor) -> Tensor:
        """(P, 4 (n + 1)) to (P, 4, n + 1)."""
        return numbers.view(-1, 4, self.reg_max + 1)
