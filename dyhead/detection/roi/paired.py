"""What is predicted of pairs of regions, an object and its visible part (Huang et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi.pooling import PyramidPool
from dyhead.detection.roi.prediction import class_and_box_layers

#: How the features of both regions are put together.
FUSIONS = ("concat", "masked")


class PairedHead(nn.Module):
    """Features of both regions side by side, fully connected layers, and one class and two boxes of the pair.

    Args:
        channels: channels C of the levels.
        strides: of the levels to pool from, by name, fine to coarse.
        num_classes: classes K.
        resolution: side S of the pooled regions.
        sampling_ratio: see :class:`PyramidPool`.
        num_fc, fc_dim: fully connected layers, and the features of each.
        fusion: "concat", or "masked": cells of the whole region outside the visible one are 0.
    """

    def __init__(
        self,
        channels: int,
        strides: Mapping[str, int],
        num_classes: int,
        *,
        resolution: int = 7,
        sampling_ratio: int = 0,
        num_fc: int = 2,
        fc_dim: int = 1024,
        fusion: str = "concat",
    ) -> None:
        super().__init__()
        self.pool = PyramidPool(strides, resolution, sampling_ratio, aligned=True)
        self.fusion = fusion
        widths = [2 * channels * resolution**2, *[fc_dim] * num_fc]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.cls_score, self.bbox_pred = class_and_box_layers(widths[-1], num_classes + 1, 8)

    def forward(self, levels: Mapping[str, Tensor], pairs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (Q, K + 1), the background last, and deltas (Q, 8), in float32 at least.

        Args:
            levels: (N, C, H, W) by name.
            pairs: of each image (Q_n, 8): whole boxes, and behind them visible ones, in pixels.
        """
        level = next(iter(levels.values()))
        # Losses are computed without autocast; levels that are half of what the layers are come from under it.
        halves = level.dtype in (torch.float16, torch.bfloat16) and self.cls_score.weight.dtype == torch.float32
        with torch.autocast(level.device.type, level.dtype if halves else torch.bfloat16, enabled=halves):
            whole, visible = (self.pool(levels, [own[:, part] for own in pairs]) for part in (_WHOLE, _VISIBLE))
            if self.fusion == "masked":
                whole = whole * cells_inside(torch.cat(list(pairs)), whole.shape[-1])[:, None]
            x = torch.cat([whole, visible], dim=1).flatten(1)
            for layer in self.fcs:
                x = layer(x).relu()
            return at_least_float32(self.cls_score(x)), at_least_float32(self.bbox_pred(x))


_WHOLE, _VISIBLE = slice(0, 4), slice(4, 8)


def cells_inside(pairs: Tensor, side: int) -> Tensor:
    """Which of S x S cells of the whole boxes have their center in the visible ones: (Q, S, S), as (Q, 8) is."""
    middle = (torch.arange(side, dtype=pairs.dtype, device=pairs.device) + 0.5) / side
    low, size = pairs[:, :2], pairs[:, 2:4] - pairs[:, :2]
    centers = low[:, None] + size[:, None] * middle[:, None]  # (Q, S, 2)
    inside = (centers >= pairs[:, None, 4:6]) & (centers <= pairs[:, None, 6:])
    return (inside[:, :, None, 1] & inside[:, None, :, 0]).to(pairs.dtype)
