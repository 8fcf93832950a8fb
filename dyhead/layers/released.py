"""The block of the published weights, which differs from the paper's equations; for checkpoints."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyhead.layers.group_norm import affine_of_group_norm
from dyhead.layers.levels import (
    Pyramid,
    check_groups,
    check_integer,
    flat,
    in_memory_format_of,
    join_pyramid,
    split_pyramid,
)
from dyhead.ops import deform_conv2d
from dyhead.ops.channelwise import affine_maximum, channel_statistics

TAPS = 9


class DeformConvNorm(nn.Module):
    """A modulated deformable 3x3 convolution (padding 1) with bias. The block applies its GroupNorm of 16 groups."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.GroupNorm(16, channels)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """(N, C, H, W), offsets (N, 18, H', W') in pixels of ``x`` and importances (N, 9, H', W') -> (N, C, H', W')."""
        return deform_conv2d(x, offset, self.weight, self.bias, stride=self.stride, padding=1, mask=mask)


class ReleasedDyHeadBlock(nn.Module):
    """The block of microsoft/DynamicHead's and of mmdetection's published weights, bit for bit. Train ``DyHeadBlock``.

    It exists for checkpoints; train new models with :class:`DyHeadBlock`. Where it differs from the paper:

    * One 3x3 convolution predicts offsets and importances from the level; three deformable convolutions, on the level,
      on the next finer one (stride 2; the offsets are then in pixels of that level) and on the next coarser one, each
      have a GroupNorm; the result on the coarser level is then resized (bilinear, corners aligned). Eq. 4 instead
      samples all levels at the same positions of the image and normalises their sum.
    * The scale-aware weight is computed from the convolved branch, ``hardsigmoid(relu(f(mean)))`` with
      ``hardsigmoid(x) = relu6(x + 3) / 6``: never below one half.
    * The dynamic ReLU pools each level separately and has no normalisation.
    * The offsets for the coarser branch have the size of the level, which is larger than that branch's output: its
      kernel reads the start of each image's memory as if it had the smaller size. The published weights were trained
      this way.

    mmdetection's block, up to its release 3.3 and with it all of its published weights, has the same arithmetic; that
    its convolutions have no bias, a bias of zero expresses. mmdetection's main branch later cut the upper left corner,
    of the coarser level's size, out of offsets and importances. For the importances that is what happens
    (``coarse_mask="corner"``); the cut offsets are a view that mmcv's kernels (CPU and CUDA) read from its first
    element as plain memory, which is the released reading again. No published weights are known that were trained so.
    (mmcv stores the gradient of those offsets at the corner; the gradient here is that of the forward pass.)

    Each level must have half the size of the previous one, rounded up.

    Args:
        channels: channels C of every level; a multiple of 16.
        coarse_mask: how the importances of the coarser branch are read: "flat", as its offsets, for all published
            weights; "corner" for weights that were trained with mmdetection's main branch after release 3.3.
        zero_init_offset: start the offset convolution at zero; otherwise its weights are normal, of standard deviation
            0.01.

    Raises:
        ValueError: ``channels`` is not a multiple of 16; ``coarse_mask`` is neither of the two.
    """

    def __init__(
        self, channels: int, *, coarse_mask: Literal["flat", "corner"] = "flat", zero_init_offset: bool = True
    ) -> None:
        super().__init__()
        channels = check_integer("channels", channels)
        check_groups("the released block's 16 norm groups", 16, channels)
        if coarse_mask not in ("flat", "corner"):
            raise ValueError(f"coarse_mask: expected 'flat' or 'corner', got {coarse_mask!r}")
        self.channels = channels
        self.coarse_mask = coarse_mask
        self.offset = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
        self.finer = DeformConvNorm(channels, stride=2)
        self.same = DeformConvNorm(channels, stride=1)
        self.coarser = DeformConvNorm(channels, stride=1)
        self.scale = nn.Conv2d(channels, 1, 1)
        self.theta = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, 4 * channels)
        )
        # The released code initialises it at random; mmdetection found zeros better (43.3 against 42.5 AP).
        if zero_init_offset:
            nn.init.zeros_(self.offset.weight)
        else:
            nn.init.normal_(self.offset.weight, std=0.01)
        nn.init.zeros_(self.offset.bias)
        nn.init.normal_(self.scale.weight, std=0.01)
        nn.init.zeros_(self.scale.bias)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Maps a pyramid (dict, list or tuple of levels, fine to coarse) to one of the same kind and shapes.

        Raises:
            TypeError, ValueError: not a valid pyramid. Names the level, what was expected and what came.
        """
        levels = split_pyramid(pyramid, self.channels, round_up=True)
        out: list[Tensor] = []
        for m, level in enumerate(levels):
            logits = self.offset(level)
            taps = logits.shape[1] // 3
            offset, mask = logits[:, : 2 * taps], logits[:, 2 * taps :].sigmoid()
            maps = [self.same(level, offset, mask)]
            norms = [(self.same.norm.weight, self.same.norm.bias)]
            if m > 0:
                maps.append(self.finer(levels[m - 1], offset, mask))
                norms.append((self.finer.norm.weight, self.finer.norm.bias))
            if m + 1 < len(levels):
                coarse = levels[m + 1]
                size = coarse.shape[2:]
                coarse_mask = mask[..., : size[0], : size[1]] if self.coarse_mask == "corner" else flat(mask, size)
                maps.append(self.coarser(coarse, flat(offset, size), coarse_mask))
                norms.append((self.coarser.norm.weight, self.coarser.norm.bias))
            out.append(in_memory_format_of(self._combine(maps, norms, level.shape[2:]), level))
        return join_pyramid(out, pyramid)

    def _combine(self, maps: list[Tensor], norms: list[tuple[Tensor, Tensor]], size: list[int]) -> Tensor:
        """Normalises, resizes, weights and averages the branches and applies the activation, (N, C, *size).

        Norms, weights and both branches of the activation are affine maps of every channel, and affine maps commute
        with resizing: one affine map replaces them all (:mod:`dyhead.ops.channelwise`). Its coefficients are computed
        for all B branches at once, (N, B, C), because on a GPU launches of small kernels are what they cost.
        """
        weight = torch.stack([weight for weight, _ in norms])
        bias = torch.stack([bias for _, bias in norms])
        norm = self.same.norm
        statistics = torch.stack([channel_statistics(x) for x in maps], dim=1)
        slope, intercept, mean = affine_of_group_norm(statistics, weight, bias, norm.num_groups, norm.eps)
        resized: list[Tensor] = []
        means: list[Tensor] = []
        for i, x in enumerate(maps):
            if torch.jit.is_tracing() or x.shape[2:] != size:  # a trace takes images of other sizes, too
                # Autocast resizes in float32 on CUDA.
                x = functional.interpolate(x, size, mode="bilinear", align_corners=True).to(x.dtype)
                means.append(slope[:, i] * channel_statistics(x)[:, 0] + intercept[:, i])
            else:
                means.append(mean[:, i])
            resized.append(x)
        mean = torch.stack(means, dim=1)
        share = self._gate(mean) / len(maps)
        mean = (mean * share).sum(1)
        coefficients = self.theta(mean.to(self.scale.weight.dtype)).to(mean.dtype)
        a1, b1, a2, b2 = (_hard_sigmoid(coefficients) - 0.5).chunk(4, dim=1)
        a = torch.stack([2 * a1 + 1, 2 * a2], dim=1)
        b = torch.stack([b1, b2], dim=1)
        slopes = a[:, :, None] * (slope * share)[:, None]
        return affine_maximum(resized, slopes, a * (intercept * share).sum(1)[:, None] + b)

    def _gate(self, mean: Tensor) -> Tensor:
        """Scale-aware weights of B branches, (N, B, 1), from their channel means (N, B, C)."""
        logit = self.scale(mean.flatten(0, 1)[:, :, None, None].to(self.scale.weight.dtype))
        return _hard_sigmoid(logit.to(mean.dtype).relu()).view(mean.shape[0], mean.shape[1], 1)


def _hard_sigmoid(x: Tensor) -> Tensor:
    # The backward pass of torch's hardsigmoid uses 1/6 in float32, which costs float64 eight digits.
    return functional.relu6(x + 3) / 6
