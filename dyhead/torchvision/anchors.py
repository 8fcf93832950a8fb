"""The anchors of :mod:`dyhead.detection` in the form that torchvision's proposal network asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from dyhead.detection import Anchors


class PyramidAnchors(nn.Module):
    """Anchors at every cell of every level of a pyramid whose strides are known, in float32.

    torchvision's own divides the padded image by the level's size instead, which is not the stride where the padding is
    not a multiple of it, and rounds the anchors to whole pixels.

    Args:
        anchors: of the levels.
    """

    def __init__(self, anchors: Anchors) -> None:
        super().__init__()
        self.anchors = anchors

    def num_anchors_per_location(self) -> list[int]:
        """Anchors of a cell, for each level."""
        return [self.anchors.per_cell] * len(self.anchors.strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """For each image the anchors of all levels (R, 4): cell after cell, row by row."""
        shapes = [tuple(level.shape[-2:]) for level in feature_maps]
        places = self.anchors(shapes, dtype=torch.float32, device=feature_maps[0].device)
        return [places.anchors] * len(image_list.image_sizes)
