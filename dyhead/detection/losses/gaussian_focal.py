"""Focal loss of heatmaps (Law and Deng, "CornerNet: Detecting Objects as Paired Keypoints", ECCV 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dyhead.options import at_least, option


@dataclass(frozen=True)
class GaussianFocalLoss:
    """Focal loss whose targets are 1 at objects and fall off around them, where less is lost by a high probability.

    For a probability p, ``-(1 - p)^alpha log(p)`` where the target y is 1, ``-(1 - y)^beta p^alpha log(1 - p)``
    elsewhere. The published code cuts p to 0.0001 to 0.9999, beyond which it has no gradient; it is not cut here.
    """

    alpha: float = option(2.0, "exponent of the weight of well classified examples; 0: none", at_least(0))
    beta: float = option(4.0, "exponent of the weight 1 - target of what is not 1; 0: all weigh 1", at_least(0))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over places and classes, from logits and targets 0 to 1, (..., K) each."""
        away, towards = F.softplus(logits), F.softplus(-logits)  # -log(1 - p), -log(p)
        of_object = (-self.alpha * away).exp() * towards
        of_rest = (1 - targets) ** self.beta * (-self.alpha * towards).exp() * away
        return of_object.where(targets == 1, of_rest).sum()
