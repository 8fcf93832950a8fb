"""The criterion of the generalized focal loss (Li et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyhead.detection.boxes.losses import iou
from dyhead.detection.criteria.matches import match
from dyhead.detection.normalizer import divisor_of
from dyhead.options import at_least, option

if TYPE_CHECKING:
    from dyhead.detection.detector import DenseDetector, Predictions, Targets


@dataclass(frozen=True)
class QualityCriterion:
    """The probability of a place's class is to be the IoU of its predicted box; boxes are distributions.

    Box losses are weighed by the place's largest class probability and divided by the sum of these weights, at least 1.
    Neither the weights nor the IoU have a gradient.
    """

    bbox_reg_loss_weight: float = option(2.0, "what the box loss is multiplied by", at_least(0))
    distribution_focal_loss_weight: float = option(
        0.25, "what the distribution focal loss, a mean of four sides, is multiplied by", at_least(0)
    )

    def __call__(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See :mod:`dyhead.detection.criteria`.

        The losses are those of the classes, of the boxes, and of the distributions; the box form is
        :class:`~dyhead.detection.boxes.Distribution`, the class loss one of targets from 0 to 1.
        """
        logits, numbers = predictions.logits, predictions.boxes
        positive, counted, anchors, boxes, labels = match(detector, predictions, targets)
        divisor = detector.loss_normalizer(positive.sum(dim=1)).to(logits.dtype)
        numbers = numbers[positive]
        with torch.no_grad():
            truth = torch.zeros_like(logits)
            truth[positive, labels] = iou(detector.box_form.decode(numbers, anchors), boxes)
            weight = logits[positive].amax(dim=1).sigmoid()
            weight = weight / divisor_of(weight.sum(), 1)
        losses = (
            detector.class_loss(logits[counted], truth[counted]) / divisor,
            self.bbox_reg_loss_weight * (weight * detector.box_form.loss(numbers, anchors, boxes)).sum(),
            self.distribution_focal_loss_weight
            * (weight * detector.box_form.focal_loss(numbers, anchors, boxes)).sum(),
        )
        return dict(zip(detector.loss_names, losses, strict=True))
