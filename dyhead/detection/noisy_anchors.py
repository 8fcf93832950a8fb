"""Soft labels and weights of positive anchors (Li et al., "Learning From Noisy Anchors ...", CVPR 2020).

An anchor that is an object's by its position may still be a poor example of it. How clean it is, is read from what the
detector says there itself: the IoU of its decoded box with the object, and the probability of the object's class. These
are functions of the two; no detector has them as an option yet. The numbers are those of the authors' code, which
differ from the paper's formulas, and has no warm-up: the scheme acts from the first iteration.

Positives are those of one image, (P,); the authors' lists an anchor as often as objects chose it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dyhead.options import below, between, option

_SMALLEST = 1e-12  # mean or range that is divided by


@dataclass(frozen=True)
class Cleanliness:
    """How clean positive anchors are, as labels and as weights. Nothing is differentiated through either."""

    alpha: float = option(0.75, "share of the IoU; the rest is the class's probability's", between(0, 1))
    largest: float = option(
        0.999,
        "IoUs and probabilities count as at most this in the weights, which would be infinite at 1; the authors' code "
        "has no such limit",
        between(0, 1) & below(1),
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


def soft_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.5, gamma: float = 2.0) -> Tensor:
    """Focal loss towards labels of 0 to 1, of the shape of logits and labels.

    ``-alpha * y * (1 - p)^gamma * log(p) - (1 - alpha) * (1 - y) * p^gamma * log(1 - p)``: the factor of each part is
    that of a hard label.
    """
    probability = logits.sigmoid()
    towards = alpha * labels * (1 - probability) ** gamma * F.softplus(-logits)
    return towards + (1 - alpha) * (1 - labels) * probability**gamma * F.softplus(logits)


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
