"""AP-Loss (Chen et al., "Towards Accurate One-Stage Object Detection With AP-Loss", CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dyhead.options import above, option

# So many pairs of a positive and another score are compared at a time: 2^23 of them are 64 MB.
_CHUNK = 2**23


@dataclass(frozen=True)
class APLoss:
    """One minus the average precision of one ranking of all places and classes of a device's images.

    With the scores s (logits), the positives P, the negatives N and ``H(x) = clamp(x / (2 delta) + 1/2, 0, 1)``, the
    rank of a positive i among the positives is ``a = 1/2 + sum over j in P of H(s_j - s_i)``, and ``b``, the sum over
    j in N, is how many negatives are above it. Its precision is ``a / (a + b)``; the loss is one minus the mean.

    The gradient is the paper's error-driven update, not the derivative: positive i gets ``-(1 - precision)``, and
    negative j gets ``H(s_j - s_i) / (a + b)`` from each i, all divided by the number of positives. So it sums to minus
    the loss over the positives, and to the loss over the negatives. No positives cost nothing.

    Time is that of comparing all positives with all negatives that are not far below them; memory is bounded.
    Several devices do not compute what one does, since each ranks its own images.
    """

    #: The mean over positives is a part of the loss: it is not to be divided by their number once more.
    normalized: ClassVar[bool] = True

    delta: float = option(1.0, "logits that differ by less count in part as ranked, in part as not", above(0))
    interpolated: bool = option(
        True, "a positive's precision is the largest of it and of the positives of lower scores, as AP is interpolated"
    )

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, at least float32; from logits and targets, above 0 for positives, (..., K) each."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _ErrorDriven.apply(logits, targets > 0, self.delta, self.interpolated)


class _ErrorDriven(torch.autograd.Function):
    """From logits and which of them are positive, of one shape, to the loss; the update in place of a derivative."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor, delta: float, interpolated: bool) -> Tensor:
        update = torch.zeros_like(logits)
        ctx.save_for_backward(update)
        count = int(positive.sum())
        if not count:
            return logits.new_zeros(())
        scores, order = logits[positive].double().sort()
        negatives = logits[~positive]
        # H is 0 of those far below every positive; a comparison that NaN passes, so that the loss is then NaN.
        near = ~(negatives < scores[0] - delta)
        above_it = _ranks(scores, negatives[near], delta)
        among = 0.5 + _ranks(scores, scores, delta)
        precision = among / (among + above_it)
        share = 1 / (among + above_it)
        if interpolated:
            largest = precision.cummax(dim=0).values
            share = torch.where(precision < largest, share * (1 - largest) / (1 - precision), share)
            precision = largest
        error = torch.empty_like(precision)
        error[order] = (precision - 1) / count
        update[positive] = error.to(update.dtype)
        pushed = torch.zeros_like(negatives)
        pushed[near] = _pushes(scores, share / count, negatives[near], delta).to(pushed.dtype)
        update[~positive] = pushed
        return (1 - precision.mean()).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        (update,) = ctx.saved_tensors
        return factor * update, None, None, None


def _ranks(scores: Tensor, others: Tensor, delta: float) -> Tensor:
    """For each of the scores the sum of H over the others, (I,) in float64, from scores (I,) and others (J,)."""
    total = torch.zeros_like(scores)
    for compared in _compare(scores, others, delta):
        total += compared.sum(dim=1)
    return total


def _pushes(scores: Tensor, weights: Tensor, others: Tensor, delta: float) -> Tensor:
    """For each of the others (J,) the sum over the scores (I,) of their weights times H, (J,) in float64."""
    # No matrix product: autocast and TF32 would round it.
    return torch.cat([compared.mul_(weights[:, None]).sum(dim=0) for compared in _compare(scores, others, delta)])


def _compare(scores: Tensor, others: Tensor, delta: float) -> Iterator[Tensor]:
    """H(others - scores), (I, some of J) at a time; in float64, as the scores are."""
    for some in others.split(max(_CHUNK // len(scores), 1)):
        yield (some - scores[:, None]).div_(2 * delta).add_(0.5).clamp_(0, 1)
