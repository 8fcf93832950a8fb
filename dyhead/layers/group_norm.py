"""GroupNorm without a pass over memory: given its statistics, it is an affine map of every channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChannelAffine(NamedTuple):
    """An affine map of every channel of every level, and the channel means of its result: each (N, L, C)."""

    slope: Tensor
    intercept: Tensor
    mean: Tensor


def affine_of_group_norm(
    statistics: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> ChannelAffine:
    """A GroupNorm as an affine map, for inputs with these channel statistics.

    Args:
        statistics: (N, L, 2, C), mean and variance of every channel of L maps (`dyhead.ops.channelwise`).
        weight, bias: of the GroupNorm, (C,), or of one for each map, (L, C).
        num_groups, eps: of the GroupNorm.
    """
    # Not unflatten, which torch.onnx's older exporter does not know.
    n, num_levels, _, channels = statistics.shape
    mean, variance = statistics.reshape(n, num_levels, 2, num_groups, channels // num_groups).unbind(-3)
    group_mean = mean.mean(-1, keepdim=True)
    # A group's variance is the variance within its channels plus that between them.
    group_variance = (variance + (mean - group_mean).square()).mean(-1, keepdim=True)
    slope = weight * torch.rsqrt(group_variance + eps).expand_as(mean).flatten(-2)
    intercept = bias - slope * group_mean.expand_as(mean).flatten(-2)
    return ChannelAffine(slope, intercept, slope * mean.flatten(-2) + intercept)
