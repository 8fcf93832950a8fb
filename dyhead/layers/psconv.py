"""Poly-Scale Convolution (Li et al., "PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional
Layer", ECCV 2020): the dilation depends on which channels are read and written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TAPS = 9


class PSConv2d(nn.Module):
    """A 3x3 convolution with several dilations, of as many weights and multiply-adds as one with a single dilation.

    The channels of a group are cut into ``parts`` equal blocks. Block o of the output reads block c of the input with
    dilation d if o = c, 2d if o - c = parts / 2 (modulo parts), and 1 else.

    ``same`` has the weights of dilation d, ``opposite`` those of 2d, ``rest`` those of 1: for every output channel the
    input's blocks that the two others leave over, in their order.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the convolution.
        dilation: d.
        groups: of channels, which do not read each other.
        parts: blocks that a group is cut into; 2 leave nothing over for dilation 1.
        bias: add one number to each channel of the output.
        dense: as the authors' code has it: ``rest`` reads all blocks of its group. Its weights of the blocks that the
            others read are 0 and stay so, but are computed with if other values are loaded; and where there are
            neither 1 nor ``parts`` groups, that code misses most of them, and they learn.

    Attributes:
        held: (C_out, C_in / groups, 1, 1), which weights of a dense ``rest`` do not learn; None without one.

    Raises:
        ValueError: ``parts`` is odd, or does not divide the channels of a group.

    Example:
        >>> PSConv2d(32, 64, stride=2)(torch.randn(1, 32, 9, 12)).shape
        torch.Size([1, 64, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 2,
        groups: int = 1,
        parts: int = 4,
        bias: bool = False,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if parts < 2 or parts % 2:
            raise ValueError(f"parts: expected an even number, got {parts}")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % (groups * parts):
                raise ValueError(
                    f"{name}: expected a multiple of {groups * parts}, {parts} blocks in each of {groups} groups, "
                    f"got {channels}"
                )
        blocks = groups * parts
        self.groups, self.parts, self.stride, self.dense = groups, parts, stride, dense
        self.same = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, blocks, bias)
        self.opposite = nn.Conv2d(in_channels, out_channels, 3, stride, 2 * dilation, 2 * dilation, blocks, bias=False)
        held, others, self.rest = None, None, None
        if dense:
            self.rest = nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
            held = _held_by_authors(self.rest.weight.shape, groups, parts)
        elif parts > 2:
            gathered = in_channels * (parts - 2)
            self.rest = nn.Conv2d(gathered, out_channels, 3, stride, 1, groups=blocks, bias=False)
            others = torch.tensor(_others(parts)).flatten()
        self.register_buffer("held", held, persistent=False)
        self.register_buffer("_others", others, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as :class:`torch.nn.Conv2d` does for one convolution of all that a channel reads."""
        bound = 1 / math.sqrt(_TAPS * self.same.in_channels // self.groups)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.zero_held()

    def zero_held(self) -> None:
        """Set to 0 the weights of a dense ``rest`` that stand for nothing."""
        if self.dense:
            with torch.no_grad():
                self.rest.weight.masked_fill_(self.held, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H_in, W_in) to (N, C_out, H, W), where H is H_in / stride, rounded up."""
        halves = x.unflatten(1, (self.groups, 2, -1))
        out = self.same(x) + self.opposite(halves.flip(2).flatten(1, 3))
        if self.rest is None:
            return out
        if self._others is not None:
            blocks = x.unflatten(1, (self.groups, self.parts, -1))
            return out + self.rest(blocks.index_select(2, self._others).flatten(1, 3))
        weight = self.rest.weight
        weight = torch.where(self.held, weight.detach(), weight)
        return out + F.conv2d(x, weight, None, self.stride, 1, 1, self.groups)


def gather(weight: Tensor, groups: int = 1, parts: int = 4) -> Tensor:
    """The weights of ``rest`` out of a dense one's.

    Args:
        weight: (C_out, C_in / groups, 3, 3).
        groups: of :class:`PSConv2d`.
        parts: likewise.

    Returns:
        (C_out, C_in / groups * (parts - 2) / parts, 3, 3).

    Raises:
        ValueError: weights of the blocks that ``same`` and ``opposite`` read are not 0: no others hold the same.
    """
    blocks = weight.unflatten(1, (parts, -1)).unflatten(0, (groups, parts, -1))
    left_over = torch.stack([blocks[:, o, :, others] for o, others in enumerate(_others(parts))], dim=1)
    held = torch.stack([blocks[:, o, :, [o, (o + parts // 2) % parts]] for o in range(parts)])
    if held.any():
        count = int(torch.count_nonzero(held))
        raise ValueError(
            f"expected 0 where the dilated convolutions read, got {count} other weights of {held.numel()}, up to "
            f"{held.abs().max():.3g}"
        )
    return left_over.flatten(3, 4).flatten(0, 2)


def scatter(weight: Tensor, groups: int = 1, parts: int = 4) -> Tensor:
    """The weights of a dense ``rest`` out of those of one that is not: the inverse of :func:`gather`."""
    blocks = weight.unflatten(1, (parts - 2, -1)).unflatten(0, (groups, parts, -1))
    whole = blocks.new_zeros(*blocks.shape[:3], parts, *blocks.shape[4:])
    for o, others in enumerate(_others(parts)):
        whole[:, o, :, others] = blocks[:, o]
    return whole.flatten(3, 4).flatten(0, 2)


def _others(parts: int) -> list[list[int]]:
    """Of every block of the output, the blocks that it reads with dilation 1."""
    return [[c for c in range(parts) if (o - c) % (parts // 2)] for o in range(parts)]


def _held_by_authors(shape: torch.Size, groups: int, parts: int) -> Tensor:
    """(C_out, C_in / groups, 1, 1), where the authors' code holds weights at 0.

    That would be where ``same`` and ``opposite`` read; but group j begins at block j * groups there, not j * parts.
    """
    held = torch.zeros(groups * parts, parts, dtype=torch.bool)
    pattern = torch.tensor([[(o - c) % (parts // 2) == 0 for c in range(parts)] for o in range(parts)])
    for first in range(0, groups * groups, groups):
        rows = held[first : first + parts]
        rows |= pattern[: len(rows)]
    out, read = shape[0] // len(held), shape[1] // parts
    return held.repeat_interleave(out, 0).repeat_interleave(read, 1)[..., None, None]
