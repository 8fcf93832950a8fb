"""Anchors: the boxes that dense predictions are relative to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from dyhead.config import ConfigError


class PyramidAnchors(AnchorGenerator):
    """Anchors at every place of every level of a pyramid whose strides are known.

    torchvision's own divides the padded picture by the level's size instead, which is not the stride where the
    padding is no multiple of it, and rounds the anchors to whole pixels. float32 whatever the levels' type.

    Args:
        sizes: for every level the square roots of the anchors' areas, in pixels of the picture; one for all levels
            if there is only one.
        aspect_ratios: for every level the ratios of height to width; one for all levels if there is only one.
        strides: for every level the distance of its pixels, in pixels of the picture.
        offset: where the first anchor's centre lies, in strides: 0 is the corner of the picture, 0.5 the centre of the
            level's first pixel.

    Raises:
        ConfigError: another number of sizes or ratios than of levels, or levels with different numbers of anchors.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        levels = len(strides)
        for key, values in (("SIZES", sizes), ("ASPECT_RATIOS", aspect_ratios)):
            if len(values) not in (1, levels) or not all(isinstance(value, (list, tuple)) for value in values):
                raise ConfigError(
                    f"MODEL.ANCHOR_GENERATOR.{key}: expected a list of 1 or {levels} lists (the levels), got {values!r}"
                )
        sizes = list(sizes) * (levels // len(sizes))
        aspect_ratios = list(aspect_ratios) * (levels // len(aspect_ratios))
        counts = [len(s) * len(a) for s, a in zip(sizes, aspect_ratios, strict=True)]
        if len(set(counts)) != 1:
            raise ConfigError(f"MODEL.ANCHOR_GENERATOR: expected as many anchors on every level, got {counts}")
        super().__init__(tuple(map(tuple, sizes)), tuple(map(tuple, aspect_ratios)))
        self.strides = tuple(strides)
        self.offset = offset

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Boxes around 0, (A, 4) as x0, y0, x1, y1 in pixels of the picture: ratio after ratio of size after size."""
        shapes = [(size / ratio**0.5, size * ratio**0.5) for size in scales for ratio in aspect_ratios]
        return torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes], dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each picture the anchors of all levels (sum of H*W*A, 4): place after place, row by row."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        levels = []
        for level, stride, cell in zip(feature_maps, self.strides, self.cell_anchors, strict=True):
            y, x = ((torch.arange(n, device=device) + self.offset) * stride for n in level.shape[-2:])
            y, x = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((centres + cell).reshape(-1, 4))
        return [torch.cat(levels)] * len(image_list.image_sizes)
