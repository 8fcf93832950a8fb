"""GroupNorm without a pass over memory: given its statistics, it is an affine map of every channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class ChannelAffine(NamedTuple):
    """An affine map of every channel of every level, and the channel means of its result: each (N, L, C)."""

    slope: Tensor
    intercept: Tensor
    mean: Tensor


def affine_of_group_norm(norm: nn.GroupNorm, statistics: Tensor) -> ChannelAffine:
    """``norm`` as an affine map, for inputs with these channel statistics.

    Args:
        norm: with weight and bias.
        statistics: (N, L, 2, C), mean and variance of every channel of L maps (`dyhead.ops.channelwise`).
    """
    # Not unflatten, which torch.onnx's older exporter does not know.
    mean, variance = statistics.reshape(
        *statistics.shape[:-1], norm.num_groups, statistics.shape[-1] // norm.num_groups
    ).unbind(-3)
    group_mean = mean.mean(-1, keepdim=True)
    # A group's variance is the variance within its channels plus that between them.
    group_variance = (variance + (mean - group_mean).square()).mean(-1, keepdim=True)
    slope = norm.weight * torch.rsqrt(group_variance + norm.eps).expand_as(mean).flatten(-2)
    intercept = norm.bias - slope * group_mean.expand_as(mean).flatten(-2)
    return ChannelAffine(slope, intercept, slope * mean.flatten(-2) + intercept)
