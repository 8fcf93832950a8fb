"""The box head that Hit-Detector (Guo et al., CVPR 2020) found: inverted residual blocks, then one linear layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from dyhead.detection.roi.registry import register_box_head
from dyhead.layers.conv_norm import NORMS
from dyhead.layers.inverted_residual import InvertedResidual
from dyhead.layers.levels import check_integer
from dyhead.options import at_least, one_of, option

# Kernel and expansion of each block.
_CELLS = ((5, 6), (3, 6), (5, 6), (5, 6))


class HitDetectorHead(nn.Module):
    """Four inverted residual blocks on the cells of a region, and a linear layer with ReLU on all of them.

    Args:
        channels: channels C of a region.
        side: cells S along each side of a region.
        fc_dim: features of the linear layer.
        norm: after each convolution: "BN", "SyncBN" or "FrozenBN".

    Attributes:
        out_features: ``fc_dim``.

    Raises:
        ValueError: a number that is no integer or below 1, or an unknown ``norm``.

    Example:
        >>> import torch
        >>> head = HitDetectorHead(32, side=7, fc_dim=64)
        >>> tuple(head(torch.randn(5, 32, 7, 7)).shape), head.out_features
        ((5, 64), 64)
    """

    def __init__(self, channels: int, side: int, *, fc_dim: int = 512, norm: str = "SyncBN") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        if side < 2:  # a norm has no variance over one cell of one region
            raise ValueError(f"side: expected at least 2 cells, got {side}")
        self.out_features = check_integer("fc_dim", fc_dim)
        self.cells = nn.Sequential(
            *(InvertedResidual(channels, channels, kernel_size, expansion, norm) for kernel_size, expansion in _CELLS)
        )
        self.fc = nn.Linear(channels * side**2, fc_dim)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Regions (Q, C, S, S) to features (Q, ``fc_dim``); Q may be 0."""
        return self.fc(self.cells(regions).flatten(1)).relu()


@register_box_head("HitDetectorHead", "MODEL.HIT_DETECTOR_HEAD")
@dataclass(frozen=True)
class HitDetectorHeadOptions:
    """The box head that Hit-Detector found, with ``MODEL.ROI_BOX_HEAD.NAME HitDetectorHead``.

    See :class:`dyhead.detection.roi.HitDetectorHead`. It takes the place of the layers that ``NUM_CONV``, ``CONV_DIM``,
    ``NORM``, ``NUM_FC`` and ``FC_DIM`` of ``MODEL.ROI_BOX_HEAD`` describe.
    """

    fc_dim: int = option(512, "features of the linear layer behind the blocks", at_least(1))
    norm: str = option("SyncBN", "after each convolution", one_of("BN", "SyncBN"))

    def build(self, channels: int, side: int) -> HitDetectorHead:
        """The module for regions (Q, channels, side, side), with random weights.

        Raises:
            ValueError: options that do not fit the channels.
        """
        return HitDetectorHead(channels, side, **asdict(self))
