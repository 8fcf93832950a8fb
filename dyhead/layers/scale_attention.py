"""Scale-aware attention, Eq. 3 of the paper: a weight for each level."""

from __future__ import annotations

from torch import Tensor, nn

from dyhead.layers.hard_sigmoid import hard_sigmoid
from dyhead.layers.levels import check_integer, mean_of_levels


class ScaleAwareAttention(nn.Module):
    """One weight in [0, 1] per level, ``sigma(f(mean of F_l))`` (Eq. 3).

    ``f`` is a linear function C -> 1 (a 1x1 convolution of the pooled level), shared by all levels; ``sigma`` is the
    hard sigmoid ``max(0, min(1, (x + 1) / 2))``, with a gradient that leads back from 0 and 1: with its own, 0, levels
    of weight 0 would be lost for good (docs/evidence.md).

    ``f`` is initialised with zero weights and a bias that gives every level the weight ``INITIAL_WEIGHT``: a stack of
    blocks must not attenuate its input (0.5 per block would leave 1/64 after six), and the hard sigmoid still has a
    gradient there.

    Args:
        channels: channels C of every level.

    Raises:
        ValueError: ``channels`` is no integer or below 1.

    Example:
        >>> import torch
        >>> levels = [torch.randn(2, 64, 16, 16), torch.randn(2, 64, 8, 8)]
        >>> ScaleAwareAttention(64)(levels).shape
        torch.Size([2, 2])
    """

    INITIAL_WEIGHT = 0.9

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = nn.Linear(check_integer("channels", channels), 1)
        nn.init.zeros_(self.f.weight)
        nn.init.constant_(self.f.bias, 2 * self.INITIAL_WEIGHT - 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """The levels' weights, (N, L), from L levels (N, C, H_l, W_l)."""
        return self.sigma(self.f(mean_of_levels(levels)).squeeze(2))

    def sigma(self, x: Tensor) -> Tensor:
        """The weights, from the results of ``f``."""
        return hard_sigmoid(x)
