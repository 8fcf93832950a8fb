"""Focal loss towards soft labels (Li et al., "Learning From Noisy Anchors ...", CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dyhead.options import at_least, between, option


@dataclass(frozen=True)
class SoftFocalLoss:
    """Focal loss whose targets lie between 0 and 1; each of its two parts has the factor that hard labels give it.

    ``-alpha y (1 - p)^gamma log(p) - (1 - alpha) (1 - y) p^gamma log(1 - p)`` for a probability p and a target y.
    """

    alpha: float = option(0.5, "weight of the positives, 1 - alpha that of the negatives", between(0, 1))
    gamma: float = option(2.0, "exponent of the weight of well classified examples; 0: none", at_least(0))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over places and classes, from logits and targets 0 to 1, (..., K) each."""
        return self.each(logits, targets).sum()

    def each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each place and class, (..., K)."""
        probability = logits.sigmoid()
        towards = self.alpha * targets * (1 - probability) ** self.gamma * F.softplus(-logits)
        return towards + (1 - self.alpha) * (1 - targets) * probability**self.gamma * F.softplus(logits)
