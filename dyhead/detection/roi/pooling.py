"""RoI pooling from a pyramid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

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
        regions = numbered(boxes)
        levels, wanted = [features[name] for name in self.strides], level_of(regions, self.strides, self.canonical_size)
        views = [self._pooled(levels, own, wanted) for own in self._enlarged(regions)]
        return views[0] if len(views) == 1 else torch.cat(views, dim=1)

    def _enlarged(self, regions: Tensor) -> Iterator[Tensor]:
        for scale in self.scales:
            if scale == 1:
                yield regions
            else:
                center, half = (regions[:, 1:3] + regions[:, 3:]) / 2, (regions[:, 3:] - regions[:, 1:3]) / 2
                yield torch.cat([regions[:, :1], center - scale * half, center + scale * half], dim=1)

    def _pooled(self, levels: list[Tensor], regions: Tensor, wanted: Tensor) -> Tensor:
        def pool(level: Tensor, own: Tensor, stride: int, _: Tensor) -> Tensor:
            return roi_align(level, own, self.resolution, 1 / stride, self.sampling_ratio, self.aligned)

        return pool_from(levels, list(self.strides.values()), regions, wanted, self.resolution, pool)


def numbered(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes (Q, 4) of each image as regions (Q, 5) of all, with their image's number in front."""
    index = torch.cat([torch.full_like(box[:, :1], i) for i, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(list(boxes))], dim=1)


def level_of(regions: Tensor, strides: Mapping[str, int], canonical_size: float = 224) -> Tensor:
    """The number, log2 of the stride, of the level that fits each region (Q, 5), of those that there are; (Q,)."""
    size = torch.sqrt((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2]))
    numbers = [stride.bit_length() - 1 for stride in strides.values()]
    return (4 + torch.log2(size / canonical_size + 1e-8)).floor().clamp(numbers[0], numbers[-1])


def pool_from(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    regions: Tensor,
    wanted: Tensor,
    side: int,
    pool: Callable[[Tensor, Tensor, int, Tensor], Tensor],
) -> Tensor:
    """Each region pooled from its level, (Q, C, S, S).

    Args:
        levels, strides: (N, C, H, W) and pixels of the image for one of the level.
        regions: (Q, 5).
        wanted: which level, see :func:`level_of`.
        side: S.
        pool: from a level, its regions, its stride, and which regions they are, to (., C, S, S).
    """
    pooled = levels[0].new_zeros(regions.shape[0], levels[0].shape[1], side, side)
    for level, stride in zip(levels, strides, strict=True):
        here = torch.where(wanted == stride.bit_length() - 1)[0]
        pooled[here] = pool(level, regions[here], stride, here).to(pooled.dtype)
    return pooled
