"""PS-ResNet and PS-ResNeXt (Li et al., "PSConv: Squeezing Feature Pyramid into One Compact Poly-Scale Convolutional
Layer", ECCV 2020): ResNets whose 3x3 convolutions have several dilations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from dyhead.backbones.registry import register_network
from dyhead.backbones.resnet import ResNetOptions, ResNetStages, initialize
from dyhead.checkpoints.psconv import gathered
from dyhead.layers.psconv import PSConv2d, scatter
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
        return PSResNet(resnet)


class PSResNet(ResNetStages):
    """PS-ResNet or PS-ResNeXt.

    Args:
        resnet: of bottlenecks with :class:`dyhead.layers.PSConv2d`.
    """

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint, before its keys are converted, with undilated convolutions in this form.

        A dense network has the same as one that is not; the other way round it takes weights that are 0 where the
        dilated convolutions read.

        Args:
            state: tensors by key, the authors' or this project's.

        Returns:
            ``state``, in which tensors of the other form are replaced, under the names that they have here.

        Raises:
            CheckpointError: other weights than 0.
        """
        layers = {name: module for name, module in self.named_modules() if isinstance(module, PSConv2d)}
        out = {}
        for key, weight in state.items():
            match = re.fullmatch(r"((?:.+\.)?(layer[1-4]\.\d+\.conv2)\.)(?:conv|rest)\.weight", key)
            if match and match[2] in layers:
                out |= _fitted(key, f"{match[1]}rest.weight", weight, layers[match[2]])
            else:
                out[key] = weight
        return out


def _fitted(key: str, name: str, weight: Tensor, layer: PSConv2d) -> dict[str, Tensor]:
    """A tensor in the layer's form under ``name``; as it is where it has no form of this layer."""
    wide = (layer.same.out_channels, layer.same.in_channels // layer.groups, 3, 3)
    narrow = (wide[0], wide[1] * (_PARTS - 2) // _PARTS, 3, 3)
    if weight.shape == wide:
        return {name: weight if layer.dense else gathered(key, weight, layer.groups)}
    if weight.shape == narrow:
        return {name: scatter(weight, layer.groups, _PARTS) if layer.dense else weight}
    return {key: weight}
