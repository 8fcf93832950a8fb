"""DR Loss (Qian et al., "DR Loss: Improving Object Detection by Distributional Ranking", CVPR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dyhead.options import above, at_least, option


@dataclass(frozen=True)
class DRLoss:
    """Ranks the distribution of the positives' probabilities above that of the negatives'.

    With the probabilities p of all places and classes, P- is the mean of the negatives' under the weights
    ``softmax(p / lambda_negative)``, close to the largest, and P+ that of the positives' under
    ``softmax(-p / lambda_positive)``, or 1 without positives. The loss is
    ``tau / L * log(1 + exp(L * (P- - P+ + margin)))``. The weights are differentiated, too, as in the authors' code:
    negatives more than lambda_negative below P- are pushed up.

    The paper's RetinaNet starts at a prior of 0.5, ignores no anchor (one IoU threshold, 0.5), and keeps scores above
    0.2. One ranking is over the images of a device, so that several devices do not compute what one does.
    """

    #: The ranking counts positives and negatives itself: nothing is to be divided by the number of positives.
    normalized: ClassVar[bool] = True

    lambda_positive: float = option(
        1.0, "temperature of the positives' weights: the lower, the more the worst positive alone counts", above(0)
    )
    lambda_negative: float = option(
        0.1 / math.log(3.5),
        "temperature of the negatives' weights: the lower, the more the worst negative alone counts",
        above(0),
    )
    sharpness: float = option(6.0, "L, how sharply the loss bends where positives pass negatives", above(0))
    tau: float = option(4.0, "slope of the loss where the ranking is wrong", above(0))
    margin: float = option(0.5, "how far positives are to be above negatives, in probability", at_least(0))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, at least float32; from logits and targets, above 0 for positives, (..., K) each."""
        probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        positive = targets > 0
        negatives, positives = probability[~positive], probability[positive]
        highest = (torch.softmax(negatives / self.lambda_negative, dim=0) * negatives).sum()
        lowest = (torch.softmax(-positives / self.lambda_positive, dim=0) * positives).sum()
        if not len(positives):
            lowest = lowest + 1
        wrong = highest - lowest + self.margin
        return self.tau / self.sharpness * F.softplus(self.sharpness * wrong)
