"""The convolutions that predict classes and boxes from pyramid levels, shared by the one-stage detectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DensePredictor(nn.Module):
    """Class logits, box deltas and a quality logit at every position of every level, on top of the unified branch.

    One convolution for each, shared by all levels (Fig. 2b of the paper: no separate towers). Weights are initialised
    from a normal distribution of standard deviation 0.01, and the class bias so that every class has probability
    ``prior_prob`` (focal loss, Lin et al., ICCV 2017).

    Args:
        channels: channels C of every level.
        num_classes: number of classes K, without background.
        num_anchors: number of anchors A per position; 1 for anchor-free detectors.
        quality: also predict one quality logit per anchor (the centre-ness of FCOS).
        num_levels: multiply the deltas of each of this many levels by its own learned factor, initially 1 (FCOS, Tian
            et al., ICCV 2019). None: no factors, any number of levels.
        prior_prob: initial probability of every class, in (0, 1).
        kernel_size: size of the convolutions, odd.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> predictor = DensePredictor(64, num_classes=3, quality=True)
        >>> [(logits, deltas, quality)] = predictor([torch.randn(2, 64, 8, 8)])
        >>> tuple(logits.shape), tuple(deltas.shape), tuple(quality.shape)
        ((2, 3, 8, 8), (2, 4, 8, 8), (2, 1, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_anchors: int = 1,
        *,
        quality: bool = False,
        num_levels: int | None = None,
        prior_prob: float = 0.01,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("num_classes", num_classes), ("num_anchors", num_anchors)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if num_levels is not None and num_levels < 1:
            raise ValueError(f"num_levels: expected at least 1, or None, got {num_levels}")
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob: expected a probability between 0 and 1, got {prior_prob}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")

        def conv(out_channels: int) -> nn.Conv2d:
            layer = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
            return layer

        self.logits = conv(num_anchors * num_classes)
        self.deltas = conv(num_anchors * 4)
        self.quality = conv(num_anchors) if quality else None
        self.delta_scale = nn.Parameter(torch.ones(num_levels)) if num_levels is not None else None
        nn.init.constant_(self.logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Predictions for each level (N, C, H, W).

        Returns:
            For each level the class logits (N, A*K, H, W), anchor by anchor; the raw box deltas (N, A*4, H, W), neither
            rectified nor exponentiated; and the quality logits (N, A, H, W), or None.

        Raises:
            ValueError: the number of levels is not ``num_levels``, if that was given.
        """
        if self.delta_scale is not None and len(levels) != len(self.delta_scale):
            raise ValueError(f"levels: expected {len(self.delta_scale)}, got {len(levels)}")
        out = []
        for i, level in enumerate(levels):
            deltas = self.deltas(level)
            if self.delta_scale is not None:
                deltas = deltas * self.delta_scale[i]
            out.append((self.logits(level), deltas, None if self.quality is None else self.quality(level)))
        return out
