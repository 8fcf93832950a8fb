"""Double-Head (Wu et al., CVPR 2020): fully connected layers say what is in a region, convolutions where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from dyhead.detection.roi.prediction import LossWeights
from dyhead.detection.roi.registry import register_box_head
from dyhead.layers.levels import check_integer
from dyhead.options import Check, above, at_least, inherited, one_of, option

NORMS = ("BN", "SyncBN", "GN")
_GROUPS = 32


class DoubleHead(nn.Module):
    """Two branches, each with a view of the region of its own: fully connected layers, and convolutions.

    The fully connected branch is ``num_fc`` layers with ReLU on all cells. The convolutional branch is a residual block
    that raises the channels to ``conv_dim``, ``num_conv`` bottlenecks, and the average over the cells. Its view is
    larger than the region, since where an object ends is seen from both sides of its border.

    Args:
        channels: channels C of a region.
        side: cells S along each side of a region.
        num_fc, fc_dim: fully connected layers, and the features of each.
        num_conv, conv_dim: bottlenecks, and their channels, of which the convolutions inside have a quarter.
        norm: after each convolution: "BN", "SyncBN", or "GN" of 32 groups.
        fc_region_scale, conv_region_scale: how many times as wide and high as the region the branch's view is.
        loss_weights: see :attr:`dyhead.detection.roi.Registered.options`.
        non_local_dim, non_local_groups: of :class:`GroupedNonLocal`, which is before each bottleneck; 0: there is none.

    Attributes:
        scales: of the views that :meth:`forward` takes: of the two branches', or one where both are the same.
        out_features: features of the fully connected branch, and of the convolutional one.

    Raises:
        ValueError: an argument outside its range, or channels that groups do not divide.

    Example:
        >>> import torch
        >>> head = DoubleHead(32, side=7, fc_dim=64, conv_dim=128)
        >>> tuple(head(torch.randn(5, 2 * 32, 7, 7)).shape), head.out_features
        ((5, 192), (64, 128))
    """

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        num_fc: int = 2,
        fc_dim: int = 1024,
        num_conv: int = 4,
        conv_dim: int = 1024,
        norm: str = "BN",
        fc_region_scale: float = 1.0,
        conv_region_scale: float = 1.3,
        loss_weights: LossWeights = ((2.0, 2.0),),
        non_local_dim: int = 0,
        non_local_groups: int = 0,
    ) -> None:
        super().__init__()
        num_fc, fc_dim = check_integer("num_fc", num_fc), check_integer("fc_dim", fc_dim)
        if side < 2:  # a norm has no variance over one cell of one region
            raise ValueError(f"side: expected at least 2 cells, got {side}")
        if conv_dim < 4 or conv_dim % 4:
            raise ValueError(f"conv_dim: expected a multiple of 4, got {conv_dim}")
        build_norm = _norm_builder(norm)
        self.scales = tuple(dict.fromkeys((fc_region_scale, conv_region_scale)))
        self.out_features = (fc_dim, conv_dim)
        self.loss_weights = loss_weights
        widths = [channels * side**2, *[fc_dim] * num_fc]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.entry = _Entry(channels, conv_dim, build_norm)
        blocks: list[nn.Module] = []
        for _ in range(num_conv):
            if non_local_groups:
                blocks.append(GroupedNonLocal(conv_dim, non_local_dim, non_local_groups, build_norm))
            blocks.append(_Bottleneck(conv_dim, build_norm))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, regions: Tensor) -> Tensor:
        """Views of regions (Q, V * C, S, S) to features (Q, ``fc_dim`` + ``conv_dim``); Q may be 0."""
        views = regions.chunk(len(self.scales), dim=1)
        of_class = views[0].flatten(1)
        for layer in self.fcs:
            of_class = layer(of_class).relu()
        of_box = self.entry(views[-1])
        for block in self.blocks:
            of_box = block(of_box)
        of_box = of_box.mean(dim=(2, 3))
        return torch.cat([of_class, of_box], dim=1)


class GroupedNonLocal(nn.Module):
    """Every cell of a region adds what it sees at all cells, in groups of channels, as they agree with its own.

    With q_i, k_j and v_j, a group's channels of three linear maps at cells i and j of HW, this is the ReLU of
    x_i + norm(W y)_i with y_i = sum_j (q_i . k_j) v_j / HW. There is no softmax. W starts at 0.

    Args:
        channels: of the region.
        inner: channels of q, k and v.
        groups: of these.
        build_norm: the norm after W, from its channels.

    Raises:
        ValueError: groups that do not divide the channels.
    """

    def __init__(self, channels: int, inner: int, groups: int, build_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        if inner < 1 or inner % groups:
            raise ValueError(f"non_local_groups: expected a divisor of the {inner} channels, got {groups}")
        self.groups = groups
        self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = build_norm(channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Regions (Q, C, S, S) to the same."""
        q, k, v = (layer(x).flatten(2).unflatten(1, (self.groups, -1)) for layer in (self.query, self.key, self.value))
        # Without a softmax q (k' v) is the same, but a region has fewer cells than a group has channels.
        agreement = q.transpose(2, 3) @ k / q.shape[3]
        seen = (v @ agreement.transpose(2, 3)).flatten(1, 2).unflatten(2, x.shape[2:])
        return (x + self.norm(self.out(seen))).relu()


class _ConvNorm(nn.Module):
    """A convolution that keeps height and width, and a norm."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, build_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = build_norm(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _Entry(nn.Module):
    """A residual block of two convolutions whose shortcut is one, too, as it has other channels than what comes in."""

    def __init__(self, inputs: int, outputs: int, build_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(inputs, inputs, 3, build_norm)
        self.conv2 = _ConvNorm(inputs, outputs, 1, build_norm)
        self.shortcut = _ConvNorm(inputs, outputs, 1, build_norm)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


class _Bottleneck(nn.Module):
    """ResNet's, whose input and output have the same channels."""

    def __init__(self, channels: int, build_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(channels, channels // 4, 1, build_norm)
        self.conv2 = _ConvNorm(channels // 4, channels // 4, 3, build_norm)
        self.conv3 = _ConvNorm(channels // 4, channels, 1, build_norm)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv3(self.conv2(self.conv1(x).relu()).relu()) + x).relu()


def _norm_builder(name: str) -> Callable[[int], nn.Module]:
    def group_norm(channels: int) -> nn.GroupNorm:
        if channels % _GROUPS:
            raise ValueError(f"norm: expected one for {channels} channels, which GN's {_GROUPS} groups do not divide")
        return nn.GroupNorm(_GROUPS, channels)

    builders = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "GN": group_norm}
    if name not in builders:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {name!r}")
    return builders[name]


@register_box_head("DoubleHead", "MODEL.DOUBLE_HEAD")
@dataclass(frozen=True)
class DoubleHeadOptions:
    """Double-Head, with ``MODEL.ROI_BOX_HEAD.NAME DoubleHead``; the defaults are mmdetection's.

    See :class:`dyhead.detection.roi.DoubleHead`. Classes are predicted by the fully connected branch, boxes by the
    convolutional one. It takes the place of the layers that ``NUM_CONV``, ``CONV_DIM``, ``NORM``, ``NUM_FC`` and
    ``FC_DIM`` of ``MODEL.ROI_BOX_HEAD`` describe.
    """

    num_fc: int = option(2, "layers of the fully connected branch", at_least(1))
    fc_dim: int = option(1024, "features of each of them", at_least(1))
    num_conv: int = option(4, "bottlenecks of the convolutional branch, after its first block", at_least(0))
    conv_dim: int = option(
        1024,
        "channels of the convolutional branch; bottlenecks have a quarter inside",
        at_least(4) & Check("a multiple of 4", lambda value: value % 4 == 0),
    )
    norm: str = option("BN", "after each convolution; GN has 32 groups", one_of(*NORMS))
    fc_region_scale: float = option(
        1.0, "the fully connected branch sees a region of so many times the width and height", above(0)
    )
    conv_region_scale: float = option(1.3, "the same of the convolutional branch", above(0))
    fc_class_loss_weight: float = option(2.0, "of the classes that the fully connected branch predicts", at_least(0))
    conv_box_loss_weight: float = option(
        2.0,
        "of the boxes that the convolutional branch predicts; this is multiplied by MODEL.ROI_BOX_HEAD."
        "BBOX_REG_LOSS_WEIGHT",
        at_least(0),
    )

    def build(self, channels: int, side: int) -> DoubleHead:
        """The module for views of regions (Q, V * channels, side, side), with random weights.

        Raises:
            ValueError: options that do not fit the channels or each other.
        """
        return DoubleHead(channels, side, **self._arguments())

    def _arguments(self) -> dict:
        return {
            "num_fc": self.num_fc,
            "fc_dim": self.fc_dim,
            "num_conv": self.num_conv,
            "conv_dim": self.conv_dim,
            "norm": self.norm,
            "fc_region_scale": self.fc_region_scale,
            "conv_region_scale": self.conv_region_scale,
            "loss_weights": ((self.fc_class_loss_weight, self.conv_box_loss_weight),),
        }


@register_box_head("DoubleHeadExt", "MODEL.DOUBLE_HEAD_EXT")
@dataclass(frozen=True)
class DoubleHeadExtOptions(DoubleHeadOptions):
    """Double-Head-Ext, with ``MODEL.ROI_BOX_HEAD.NAME DoubleHeadExt``; the defaults are the authors'.

    As Double-Head, but both branches learn both tasks, each bottleneck follows a grouped non-local block, and a class's
    score is that of either branch, 1 - (1 - s)(1 - t). Boxes are the convolutional branch's.
    """

    num_conv: int = inherited(DoubleHeadOptions, "num_conv", 2)
    fc_class_loss_weight: float = inherited(DoubleHeadOptions, "fc_class_loss_weight", 1.4)
    conv_class_loss_weight: float = option(0.5, "of the classes that the convolutional branch predicts", at_least(0))
    fc_box_loss_weight: float = option(
        0.6, "of the boxes that the fully connected branch predicts, likewise multiplied", at_least(0)
    )
    non_local_dim: int = option(512, "channels inside a non-local block", at_least(1))
    non_local_groups: int = option(4, "groups of them; it divides NON_LOCAL_DIM", at_least(1))

    def _arguments(self) -> dict:
        arguments = super()._arguments()
        crossed = (self.conv_class_loss_weight, self.fc_box_loss_weight)
        return arguments | {
            "loss_weights": (*arguments["loss_weights"], crossed),
            "non_local_dim": self.non_local_dim,
            "non_local_groups": self.non_local_groups,
        }
