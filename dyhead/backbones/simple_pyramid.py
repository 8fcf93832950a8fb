"""The simple feature pyramid of ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones", ECCV 2022)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.backbones.timm import over_channels
from dyhead.layers import P6P7


class SimplePyramid(nn.Module):
    """A pyramid from one map of stride 16: transposed convolutions make it finer, pooling coarser; nothing is added up.

    Parameters have the names of Detectron2's ``SimpleFeaturePyramid``.

    Args:
        in_channels: of the map.
        out_channels: channels C of every level.
        finest: number of the finest level, 2 (stride 4) to 4; P5 is the last one that is made of the map.
        top_block: makes P6 and P7 from P5; None: P6 is every second pixel of P5.

    Attributes:
        strides: of every level by its name, fine to coarse, in pixels of the image.

    Raises:
        ValueError: channels that cannot be quartered; another finest level.
    """

    #: The map that is read.
    in_feature = "res4"

    def __init__(self, in_channels: int, out_channels: int, finest: int = 2, top_block: P6P7 | None = None) -> None:
        super().__init__()
        if finest not in (2, 3, 4):
            raise ValueError(f"finest: expected 2, 3 or 4, got {finest}")
        if in_channels % 4:
            raise ValueError(f"in_channels: expected a multiple of 4, got {in_channels}")
        self.levels = range(finest, 6)
        for level in self.levels:
            self.add_module(f"simfp_{level}", nn.Sequential(*_resized(in_channels, level, out_channels)))
        self.top_block = top_block
        last = 6 if top_block is None else 5 + top_block.num_levels
        self.strides = {f"p{level}": 2**level for level in range(finest, last + 1)}

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network's maps, of which "res4" is read, to the levels (N, C, H / stride, W / stride) by name."""
        x = maps[self.in_feature]
        levels = [self.get_submodule(f"simfp_{level}")(x) for level in self.levels]
        if self.top_block is None:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        else:
            levels += self.top_block(levels[-1])
        return OrderedDict(zip(self.strides, levels, strict=True))


def _resized(channels: int, level: int, out_channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if level < 4:
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
    if level < 3:
        layers += [_LayerNorm(channels // 2), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2))
    if level > 4:
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    width = channels // 2 ** max(4 - level, 0)
    return [*layers, _NormedConv2d(width, out_channels, 1), _NormedConv2d(out_channels, out_channels, 3)]


class _LayerNorm(nn.LayerNorm):
    """Over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return over_channels(super().forward, x)


class _NormedConv2d(nn.Conv2d):
    """A convolution that keeps height and width, and the norm after it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = _LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))
