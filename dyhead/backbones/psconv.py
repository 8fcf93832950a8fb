"""PS-ResNet and PS-ResNeXt (Li et al., "PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional
Layer", ECCV 2020): ResNets whose 3x3 convolutions have several dilations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dyhead.backbones.registry import register_network
from dyhead.backbones.resnet import ResNetOptions, ResNetStages, initialize
from dyhead.layers.psconv import PSConv2d
from dyhead.options import Check, at_least, option

_PARTS = 4


@register_network("psconv")
@dataclass(frozen=True)
class PSConvOptions(ResNetOptions):
    """The network of ``build_psconv_fpn_backbone`` and ``build_psconv_fpn_p6p7_backbone``: PS-ResNet or PS-ResNeXt.

    ResNeXt-101-32x4d is ``DEPTH 101``, ``NUM_GROUPS 32``, ``WIDTH_PER_GROUP 4``.
    """

    num_groups: int = option(1, "groups of the 3x3 convolutions", at_least(1))
    width_per_group: int = option(
        64,
        "channels of a group in the first stage, twice as many in each that follows",
        at_least(_PARTS) & Check(f"a multiple of {_PARTS}", lambda value: value % _PARTS == 0),
    )
    dense: bool = option(
        False,
        "undilated convolutions are whole, as in the authors' code: their weights of PS-ResNeXt need it, and those of "
        "PS-ResNet if they are not 0 where the dilated ones read; the 3x3 convolutions then cost half as much again",
    )

    @property
    def title(self) -> str:
        """What tables call the network."""
        kind = f"PS-ResNet-{self.depth}"
        if self.num_groups > 1:
            kind = f"PS-ResNeXt-{self.depth}-{self.num_groups}x{self.width_per_group}d"
        return f"{kind}, dense" if self.dense else kind

    def build(self, wanted: Collection[str] | None = None) -> PSResNet:
        """The network, with random weights.

        Args:
            wanted: the maps that are read; it makes no difference.
        """
        resnet = self.resnet(groups=self.num_groups, width_per_group=self.width_per_group)
        for block in [block for number in range(1, 5) for block in getattr(resnet, f"layer{number}")]:
            conv = block.conv2
            block.conv2 = PSConv2d(
                conv.in_channels,
                conv.out_channels,
                conv.stride[0],
                groups=conv.groups,
                parts=_PARTS,
                dense=self.dense,
            )
            initialize(block.conv2)
            block.conv2.zero_held()
        return PSResNet(resnet, dense=self.dense)


class PSResNet(ResNetStages):
    """PS-ResNet or PS-ResNeXt.

    Args:
        resnet: of bottlenecks with :class:`dyhead.layers.PSConv2d`.
        dense: whether these are dense.
    """

    def __init__(self, resnet: nn.Module, *, dense: bool) -> None:
        super().__init__(resnet)
        self.dense = dense

    def as_they_are(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights of a checkpoint, before its keys are converted.

        Those of the authors' undilated convolutions get the name that they have here if the network is dense, and so
        nothing will be left out of them.
        """
        return {key.replace(".conv2.conv.", ".conv2.rest."): x for key, x in state.items()} if self.dense else state
