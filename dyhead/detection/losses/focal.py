"""Focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dyhead.options import Check, at_least, option


@dataclass(frozen=True)
class FocalLoss:
    """Binary cross-entropy of every class, weighed down where the prediction is right already."""

    alpha: float = option(
        0.25,
        "weight of the positives, 1 - alpha that of the negatives; -1: no weights",
        Check("0 to 1, or -1", lambda value: value == -1 or 0 <= value <= 1),
    )
    gamma: float = option(2.0, "exponent of the weight of well classified examples; 0: none", at_least(0))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over places and classes, from logits and targets 0 or 1, (..., K) each."""
        return sigmoid_focal_loss(logits, targets, self.alpha, self.gamma, reduction="sum")
