"""PyConvResNet and PyConvHGResNet (Duta et al., "Pyramidal Convolution: Rethinking Convolutional Neural Networks for
Visual Recognition", 2020): ResNets with kernels of several sizes side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from dyhead.backbones.registry import register_network
from dyhead.backbones.resnet import ResNetOptions, ResNetStages, initialize
from dyhead.layers.pyconv import PyConv2d
from dyhead.options import option

# Of each stage: which part of the channels a kernel computes, in quarters, the 3x3 kernel first; and its groups.
_QUARTERS = ((1, 1, 1, 1), (1, 1, 2), (2, 2), (4,))
_GROUPS = ((1, 4, 8, 16), (1, 4, 8), (1, 4), (1,))
_HIGH_GROUPS = ((32, 32, 32, 32), (32, 64, 64), (32, 64), (32,))


@register_network("pyconv")
@dataclass(frozen=True)
class PyConvOptions(ResNetOptions):
    """The network of ``build_pyconv_fpn_backbone`` and ``build_pyconv_fpn_p6p7_backbone``: PyConvResNet.

    Stages have kernels of 3, 5, 7 and 9; 3, 5 and 7; 3 and 5; and 3 pixels.
    """

    high_groups: bool = option(False, "PyConvHGResNet: kernels read and compute twice the channels, in more groups")

    @property
    def title(self) -> str:
        """What tables call the network."""
        return f"PyConv{'HG' * self.high_groups}ResNet-{self.depth}"

    def build(self, wanted: Collection[str] | None = None) -> ResNetStages:
        """The network, with random weights.

        Args:
            wanted: the maps that are read; it makes no difference.
        """
        resnet = self.resnet(width_per_group=128 if self.high_groups else 64)
        resnet.maxpool = nn.Identity()  # the first stage has stride 2 instead
        for number, groups in enumerate(_HIGH_GROUPS if self.high_groups else _GROUPS):
            stage = getattr(resnet, f"layer{number + 1}")
            conv, norm = stage[0].downsample
            conv.stride = (1, 1)
            stage[0].downsample = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1), conv, norm)
            for index, block in enumerate(stage):
                channels, stride = block.conv2.in_channels, 2 if index == 0 else 1
                block.conv2 = _convolution(channels, _QUARTERS[number], groups, stride)
        return ResNetStages(resnet)


def _convolution(channels: int, quarters: Sequence[int], groups: Sequence[int], stride: int) -> nn.Module:
    """A pyramidal convolution as wide as its input, or a plain one where there is a single kernel."""
    if len(groups) == 1:
        conv: nn.Module = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups[0], bias=False)
    else:
        kernels = range(3, 3 + 2 * len(groups), 2)
        conv = PyConv2d(channels, [channels * part // 4 for part in quarters], kernels, groups, stride)
    initialize(conv)
    return conv
