"""What networks share that are torchvision's ResNet but for some of its convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dyhead.options import one_of, option

_STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


@dataclass(frozen=True)
class ResNetOptions:
    """The options of networks of bottlenecks."""

    depth: int = option(50, "layers of the network", one_of(50, 101, 152))
    frozen_bn: bool = option(
        True, "keep batch normalization as it is in the weights, as MODEL.RESNETS.NORM FrozenBN does"
    )

    def check(self) -> None:
        """Do nothing: every legal value goes with every other."""

    def resnet(self, *, groups: int = 1, width_per_group: int = 64) -> nn.Module:
        """torchvision's network, with random weights.

        Args:
            groups: of the 3x3 convolutions.
            width_per_group: channels of a group in the first stage.
        """
        import torchvision  # not before: checkpoints are converted without it

        return getattr(torchvision.models, f"resnet{self.depth}")(
            weights=None,
            groups=groups,
            width_per_group=width_per_group,
            norm_layer=torchvision.ops.FrozenBatchNorm2d if self.frozen_bn else nn.BatchNorm2d,
        )


class ResNetStages(nn.Module):
    """A ResNet of torchvision's without its classifier; the names of its parameters stay.

    Args:
        resnet: of bottlenecks.

    Attributes:
        channels: of each map, by its name, from fine to coarse.
        strides: likewise, in pixels of the image.
    """

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.channels = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
        self.strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
        for name in ("conv1", "bn1", "relu", "maxpool", *_STAGES.values()):
            self.add_module(name, getattr(resnet, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to maps (N, C, H / stride, W / stride) by name, fine to coarse; sizes are rounded up."""
        maps, x = {}, self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name, stage in _STAGES.items():
            maps[name] = x = getattr(self, stage)(x)
        return maps


def initialize(module: nn.Module) -> None:
    """Draw the weights of the convolutions in ``module`` as those of torchvision's ResNets are."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
