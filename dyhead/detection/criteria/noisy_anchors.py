"""Soft labels and weights of positive anchors (Li et al., "Learning From Noisy Anchors ...", CVPR 2020).

An anchor that is an object's by its position may still be a poor example of it. How clean it is, is read from what the
detector says there itself: the IoU of its decoded box with the object, and the probability of the object's class. The
numbers are those of the authors' code, which differ from the paper's formulas, and has no warm-up: the scheme acts from
the first iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyhead.detection.boxes.losses import iou
from dyhead.detection.criteria.matches import match
from dyhead.options import at_least, below, between, option, part

if TYPE_CHECKING:
    from dyhead.detection.detector import DenseDetector, Predictions, Targets

_SMALLEST = 1e-12  # mean or range that is divided by


@dataclass(frozen=True)
class Cleanliness:
    """How clean the positive anchors of one image are, as labels and as weights; neither has a gradient."""

    alpha: float = option(0.75, "share of the IoU; the rest is the class's probability's", between(0, 1))
    largest: float = option(
        0.999,
        "IoUs and probabilities count as at most this in the weights, which would be infinite at 1; the authors' code "
        "has no such limit",
        at_least(0) & below(1),
    )

    @torch.no_grad()
    def labels(self, iou: Tensor, confidence: Tensor) -> Tensor:
        """What the anchors' classes are trained towards, (P,), from IoUs and probabilities, (P,) each.

        Each of the two is divided by its mean, and the weighted sum of them stretched, so that the cleanest anchor has
        label 1 and the least clean one the mean IoU. If all are alike, as a single one is, they have label 1.
        """
        if not len(iou):
            return torch.zeros_like(iou)
        clean = self.alpha * _of_mean(iou) + (1 - self.alpha) * _of_mean(confidence)
        low, high = clean.aminmax()
        if high - low < _SMALLEST:
            return torch.ones_like(iou)
        lowest = iou.mean()
        return lowest + (1 - lowest) * (clean - low) / (high - low)

    @torch.no_grad()
    def weights(self, iou: Tensor, confidence: Tensor) -> Tensor:
        """What the anchors' losses are weighed by, (P,), of mean 1, from IoUs and probabilities, (P,) each.

        ``f(x) = 1 / (1 - x)`` of each of the two, divided by its mean, and summed with their shares.
        """
        far, sure = (1 / (1 - part.clamp(max=self.largest)) for part in (iou, confidence))
        return self.alpha * _of_mean(far) + (1 - self.alpha) * _of_mean(sure)


def _of_mean(values: Tensor) -> Tensor:
    return values / values.mean().clamp(min=_SMALLEST) if len(values) else values


def reweigh(losses: Tensor, weights: Tensor) -> Tensor:
    """Losses times weights times one factor, by which the sum stays what it was: only gradients show the weights.

    Args:
        losses: of any shape.
        weights: of a shape that broadcasts to it.
    """
    weighed = losses * weights
    total = weighed.sum()
    factor = torch.where(total == 0, 1, losses.sum() / total)
    return weighed * factor.detach()


@dataclass(frozen=True)
class NoisyAnchorsCriterion:
    """Clean anchors are trained towards high class probabilities, and weigh more.

    A positive place's label is how clean it is, 0 elsewhere; the losses of its classes and of its box are weighed
    likewise (:class:`Cleanliness`), without a change of their sums. Means are over the positives of an image, each
    once; the authors' code counts an anchor as often as objects chose it.
    """

    cleanliness: Cleanliness = part(Cleanliness(), prefix="CLEANLINESS_")

    def __call__(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See :mod:`dyhead.detection.criteria`.

        The losses are those of the classes and of the boxes. The class loss is one with a method ``each``, as
        :class:`~dyhead.detection.losses.SoftFocalLoss` has.
        """
        logits, numbers = predictions.logits, predictions.boxes
        positive, counted, anchors, boxes, labels = match(detector, predictions, targets)
        counts = positive.sum(dim=1)
        divisor = detector.loss_normalizer(counts).to(logits.dtype)
        numbers = numbers[positive]
        with torch.no_grad():
            overlap = iou(detector.box_form.decode(numbers, anchors), boxes).split(counts.tolist())
            confidence = logits[positive, labels].sigmoid().split(counts.tolist())
            images = list(zip(overlap, confidence, strict=True))
            weight = torch.cat([self.cleanliness.weights(*image) for image in images])
            weights = torch.ones_like(logits[..., :1])
            weights[positive, 0] = weight
            truth = torch.zeros_like(logits)
            truth[positive, labels] = torch.cat([self.cleanliness.labels(*image) for image in images])
        class_losses = detector.class_loss.each(logits[counted], truth[counted])
        box_losses = detector.box_loss.weight * detector.box_form.loss(numbers, anchors, boxes)
        losses = reweigh(class_losses, weights[counted]), reweigh(box_losses, weight)
        return {name: loss.sum() / divisor for name, loss in zip(detector.loss_names, losses, strict=True)}
