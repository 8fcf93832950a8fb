"""Two boxes of an object, all of it and what is visible (Huang et al., CVPR 2020), as deltas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dyhead.detection.boxes.deltas import Deltas


@dataclass(frozen=True)
class DeltaPairs(Deltas):
    """The deltas of the whole box and then those of the visible one.

    Either is relative to a box of its own, where places are pairs of boxes (P, 8); to the same, where they are boxes.
    """

    per_place = 8

    @property
    def _single(self) -> Deltas:
        return Deltas(self.bbox_reg_weights, self.bbox_reg_loss_type, self.smooth_l1_loss_beta)

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Pairs of boxes (P, 8) from deltas (P, 8) and anchors (P, 4) or (P, 8)."""
        return self._single.decode(numbers.reshape(-1, 4), _singles(anchors)).view(-1, 8)

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What predictions cost, (P, 2), from deltas (P, 8), anchors (P, 4) or (P, 8) and true pairs (P, 8)."""
        return self._single.loss(numbers.reshape(-1, 4), _singles(anchors), boxes.reshape(-1, 4)).view(-1, 2)


def _singles(anchors: Tensor) -> Tensor:
    """Both boxes of each, one after the other, (2P, 4)."""
    return anchors.unflatten(1, (-1, 4)).expand(-1, 2, -1).reshape(-1, 4)
