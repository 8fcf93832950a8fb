"""The criterion of BorderDet (Qiu et al., ECCV 2020): FCOS's, and the same again of what its boxes' borders tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dyhead.detection.criteria.matches import class_cost, matched
from dyhead.detection.criteria.standard import standard
from dyhead.options import at_least, option

if TYPE_CHECKING:
    from dyhead.detection.anchors import Places
    from dyhead.detection.detector import DenseDetector, Predictions, Targets
    from dyhead.detection.normalizer import LossNormalizer


@dataclass(frozen=True)
class BorderWeights:
    """What the losses of the second stage are multiplied by."""

    border_class_loss_weight: float = option(1.0, "what the border's class loss is multiplied by", at_least(0))
    border_box_loss_weight: float = option(1.0, "what the border's box loss is multiplied by", at_least(0))


class BorderCriterion(nn.Module):
    """Coarse boxes cost what FCOS's cost; border classes and refined boxes are assigned by the coarse boxes.

    The detector's box form is :class:`~dyhead.detection.boxes.Borders`. See :mod:`dyhead.detection.criteria`. The
    losses are those of the classes, the coarse boxes and the quality, then of the border classes and the refined boxes.
    No gradient of the latter two reaches the coarse boxes.

    Args:
        border_assigner: is given the coarse boxes of each image as anchors, as they are beyond the image, too.
        border_normalizer: what both losses of the second stage are divided by, of their own positive places.
        weights: of these two losses.
    """

    def __init__(
        self,
        border_assigner: Callable[[Places, Tensor], Tensor],
        border_normalizer: LossNormalizer,
        weights: BorderWeights = BorderWeights(),
    ) -> None:
        super().__init__()
        self.border_assigner = border_assigner
        self.border_normalizer = border_normalizer
        self.weights = weights

    def forward(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Scalars by name."""
        numbers, logits, form = predictions.boxes, predictions.refined_logits, detector.box_form
        losses = standard(detector, predictions._replace(boxes=numbers[..., :4]), targets, form.coarse)
        anchors = detector.places(predictions).anchors
        matches = matched(anchors, self.assign(detector, predictions, targets), targets)
        divisor = self.border_normalizer(matches.positive.sum(dim=1)).to(logits.dtype)
        box_cost = form.loss(numbers[matches.positive], matches.anchors, matches.boxes).sum() / divisor
        of_class, of_box = detector.loss_names[3:]
        losses[of_class] = self.weights.border_class_loss_weight * class_cost(detector, logits, matches, divisor)
        losses[of_box] = self.weights.border_box_loss_weight * box_cost
        return losses

    @torch.no_grad()
    def assign(self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]) -> Tensor:
        """Which object each coarse box belongs to, (N, R)."""
        places = detector.places(predictions)
        assigned = []
        for numbers, target in zip(predictions.boxes, targets, strict=True):
            coarse = places._replace(anchors=detector.box_form.decode_coarse(numbers, places.anchors))
            assigned.append(self.border_assigner(coarse, target.boxes.to(places.anchors.dtype)))
        return torch.stack(assigned)
