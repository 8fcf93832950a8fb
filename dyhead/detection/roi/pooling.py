"""RoI pooling from a pyramid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


class PyramidPool(nn.Module):
    """RoI pooling from the level that fits a region's size (Lin et al., "Feature Pyramid Networks", Eq. 1).

    torchvision's own guesses the strides from the first images it sees, without their padding, and does not align.

    Args:
        strides: of the levels to pool from, by name, fine to coarse.
        resolution: side S of the pooled regions.
        sampling_ratio: samples in a cell, per axis; 0 is as many as there are pixels.
        aligned: shift by half a pixel ("ROIAlignV2" of Detectron2).
        scales: V factors by which a region is enlarged around its center. The level is that of the region as it is.
        canonical_size: root of the area, in pixels, from which on a region belongs to the level of stride 16.
    """

    def __init__(
        self,
        strides: Mapping[str, int],
        resolution: int,
        sampling_ratio: int,
        aligned: bool,
        scales: Sequence[float] = (1.0,),
        canonical_size: float = 224,  # ImageNet's image
    ) -> None:
        super().__init__()
        self.strides = dict(strides)
        self.resolution = resolution
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.scales = tuple(scales)
        self.canonical_size = canonical_size

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]] = ()
    ) -> Tensor:
        """Levels (N, C, H, W) and boxes of each image in pixels to (Q, V * C, S, S), scale after scale.

        The sizes do not matter.
        """
        index = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        regions = torch.cat([index, torch.cat(boxes)], dim=1)
        size = torch.sqrt((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2]))
        numbers = [stride.bit_length() - 1 for stride in self.strides.values()]  # log2
        wanted = (4 + torch.log2(size / self.canonical_size + 1e-8)).floor().clamp(numbers[0], numbers[-1])
        views = [self._pooled([features[name] for name in self.strides], r, wanted) for r in self._enlarged(regions)]
        return views[0] if len(views) == 1 else torch.cat(views, dim=1)

    def _enlarged(self, regions: Tensor) -> Iterator[Tensor]:
        for scale in self.scales:
            if scale == 1:
                yield regions
            else:
                center, half = (regions[:, 1:3] + regions[:, 3:]) / 2, (regions[:, 3:] - regions[:, 1:3]) / 2
                yield torch.cat([regions[:, :1], center - scale * half, center + scale * half], dim=1)

    def _pooled(self, levels: list[Tensor], regions: Tensor, wanted: Tensor) -> Tensor:
        pooled = levels[0].new_zeros(len(regions), levels[0].shape[1], self.resolution, self.resolution)
        for level, stride in zip(levels, self.strides.values(), strict=True):
            here = torch.where(wanted == stride.bit_length() - 1)[0]
            out = roi_align(level, regions[here], self.resolution, 1 / stride, self.sampling_ratio, self.aligned)
            pooled[here] = out.to(pooled.dtype)
        return pooled
