"""Quality focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dyhead.options import at_least, option

# Where prediction and target are as near as this the weight has no gradient: that of a root would be infinite.
_NEAR = 1e-12


@dataclass(frozen=True)
class QualityFocalLoss:
    """Binary cross-entropy of every class with targets from 0 to 1, weighed down where the prediction is near its own.

    ``|y - p|^beta (-(1 - y) log(1 - p) - y log p)`` for a probability p and a target y. It is least at p = y.
    """

    beta: float = option(
        2.0,
        "exponent of the distance of a probability from its target, which weighs the loss; 0: no weights",
        at_least(0),
    )

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum over places and classes, from logits and targets 0 to 1, (..., K) each."""
        weight = (targets - logits.sigmoid()).abs().clamp(min=_NEAR) ** self.beta
        return (weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()
