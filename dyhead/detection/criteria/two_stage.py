"""The criterion of RepPoints (Yang et al., ICCV 2019): first boxes, then what is refined at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dyhead.detection.criteria.matches import class_cost, matched
from dyhead.options import at_least, option

if TYPE_CHECKING:
    from dyhead.detection.anchors import Places
    from dyhead.detection.detector import DenseDetector, Predictions, Targets
    from dyhead.detection.normalizer import LossNormalizer


@dataclass(frozen=True)
class StageWeights:
    """What the box losses of the two stages are multiplied by."""

    first_box_loss_weight: float = option(0.5, "what the loss of the first boxes is multiplied by", at_least(0))
    refined_box_loss_weight: float = option(1.0, "what the loss of the refined boxes is multiplied by", at_least(0))


class TwoStage(nn.Module):
    """The places of first boxes are assigned by where they are; classes and refined boxes by the first boxes.

    The detector's assigner is given the first boxes of each image as anchors, without a gradient; its box form has
    ``decode_first`` and ``loss_first`` besides. See :mod:`dyhead.detection.criteria`. The losses are those of the
    classes, of the first boxes, and of the refined ones.

    Args:
        first_assigner: of the first boxes' places.
        first_normalizer: what their loss is divided by; the others by the detector's normalizer, of the positive places
            of the second assignment.
        weights: of the box losses.
    """

    def __init__(
        self,
        first_assigner: Callable[[Places, Tensor], Tensor],
        first_normalizer: LossNormalizer,
        weights: StageWeights = StageWeights(),
    ) -> None:
        super().__init__()
        self.first_assigner = first_assigner
        self.first_normalizer = first_normalizer
        self.weights = weights

    def forward(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Scalars by name."""
        logits, numbers = predictions.logits, predictions.boxes
        anchors = detector.places(predictions).anchors
        first, refined = (
            matched(anchors, assigned, targets) for assigned in self.assign(detector, predictions, targets)
        )
        first_divisor = self.first_normalizer(first.positive.sum(dim=1)).to(logits.dtype)
        divisor = detector.loss_normalizer(refined.positive.sum(dim=1)).to(logits.dtype)
        form, weights = detector.box_form, self.weights
        first_cost = form.loss_first(numbers[first.positive], first.anchors, first.boxes).sum()
        refined_cost = form.loss(numbers[refined.positive], refined.anchors, refined.boxes).sum()
        costs = (
            class_cost(detector, logits, refined, divisor),
            weights.first_box_loss_weight * first_cost / first_divisor,
            weights.refined_box_loss_weight * refined_cost / divisor,
        )
        return dict(zip(detector.loss_names, costs, strict=True))

    @torch.no_grad()
    def assign(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> tuple[Tensor, Tensor]:
        """Which object each place belongs to for the first boxes, and for all else, (N, R) each."""
        places = detector.places(predictions)
        first, refined = [], []
        for numbers, target in zip(predictions.boxes, targets, strict=True):
            boxes = target.boxes.to(places.anchors.dtype)
            first.append(self.first_assigner(places, boxes))
            seen = places._replace(anchors=detector.box_form.decode_first(numbers, places.anchors))
            refined.append(detector.assigner(seen, boxes))
        return torch.stack(first), torch.stack(refined)
