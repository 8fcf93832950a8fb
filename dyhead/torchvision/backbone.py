"""The pyramid that the detectors stand on: ResNet or another network, FPN, extra levels and necks.

N batch, C channels, H, W height and width of a level in its own pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain

import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dyhead.backbones import NETWORKS, SimplePyramid
from dyhead.build import build_necks, build_network, necks_with_dyhead, simple_pyramid_arguments
from dyhead.config import ConfigError, has_simple_pyramid, network_of, options_of
from dyhead.layers import P6P7, DeformConv2dPack
from dyhead.necks import Necked, Stack

_DIVISOR = 32  # of Detectron2's FPN: what its finest and coarsest stage ask for

_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "": None,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
}

#: ``MODEL.BACKBONE.NAME``: whether P6 and P7 are convolved (else P6 is pooled), and what from, where the name says it;
#: None: the network has them.
BACKBONES: dict[str, tuple[bool, str | None] | None] = {
    "build_resnet_fpn_backbone": (False, None),
    "build_resnet_fpn_p6p7_backbone": (True, None),
    "build_retinanet_resnet_fpn_backbone": (True, "res5"),
    "build_resnet_fpn_dyhead_backbone": (False, None),
    "build_retinanet_resnet_fpn_dyhead_backbone": (True, None),
    **{
        name: ("p6p7" in name, None) if "_fpn_" in name else None
        for network in NETWORKS.values()
        for name in network.builders
    },
}


class Pyramid(Necked):
    """A network that puts out a pyramid, and necks on it; torchvision's detectors take it as their backbone.

    Args:
        body: the network, from images to its maps by name.
        channels: channels C of every level of the pyramid.
        strides: for every level, fine to coarse, the distance of its pixels, in pixels of the image.
        size_divisibility: what the network asks for.

    Attributes:
        out_channels: channels C.
        strides: see above.
        size_divisibility: images are padded to multiples of it, in pixels.
    """

    def __init__(self, body: nn.Module, channels: int, strides: Mapping[str, int], size_divisibility: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = channels
        self.strides = dict(strides)
        self.size_divisibility = size_divisibility
        self.attach(())

    @property
    def laterals(self) -> dict[str, nn.Module]:
        """The convolutions of the network's stages, by the level that each is added to, where FPN adds them up."""
        return {}

    def add_necks(self, necks: Stack, size_divisibility: int = 0) -> None:
        """Let necks follow, each a child of its own name.

        Args:
            necks: of levels with these strides and channels.
            size_divisibility: 0: what the pyramid and the necks ask for.
        """
        self.attach(necks.named_children())
        self.size_divisibility = size_divisibility or math.lcm(self.size_divisibility, necks.size_divisibility)

    def levels(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels before the necks, by name."""
        return self.body(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels (N, C, H / stride, W / stride, sizes rounded up), by name."""
        return OrderedDict(self.through_necks(self.levels(x)))


class FeaturePyramid(Pyramid):
    """A network with a feature pyramid network, and necks on it.

    Args:
        body: the network, from images to its stages by name; stage "res3" is of stride 2^3.
        widths: channels of the stages the pyramid is built on, by name, from fine to coarse and up to the last.
        channels: channels C of every level of the pyramid.
        top: makes the coarser levels from the pyramid and the stages.
        norm: normalization in the pyramid's convolutions, none by default.
    """

    def __init__(
        self,
        body: nn.Module,
        widths: Mapping[str, int],
        channels: int,
        top: PooledTop | ConvolvedTop,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        strides = {f"p{n}": 2**n for n in (*map(_number, widths), *top.levels)}
        super().__init__(body, channels, strides, _DIVISOR)
        self.fpn = FeaturePyramidNetwork(list(widths.values()), channels, extra_blocks=top, norm_layer=norm)
        self._stages = {stage: f"p{_number(stage)}" for stage in widths}

    @property
    def laterals(self) -> dict[str, nn.Module]:
        """See :attr:`Pyramid.laterals`."""
        return dict(zip(self._stages.values(), self.fpn.inner_blocks, strict=True))

    def levels(self, x: Tensor) -> dict[str, Tensor]:
        """See :meth:`Pyramid.levels`."""
        stages = self.body(x)
        return self.fpn(OrderedDict((level, stages[stage]) for stage, level in self._stages.items()))


class PlainPyramid(Pyramid):
    """A network of one map with ViTDet's simple pyramid, and necks on it.

    Args:
        body: the network, from images to its maps by name.
        fpn: from these to the levels.
        channels: channels C of every level.
    """

    def __init__(self, body: nn.Module, fpn: SimplePyramid, channels: int) -> None:
        super().__init__(body, channels, fpn.strides, _DIVISOR)
        self.fpn = fpn

    def levels(self, x: Tensor) -> dict[str, Tensor]:
        """See :meth:`Pyramid.levels`."""
        return self.fpn(self.body(x))


class PooledTop(ExtraFPNBlock):
    """P6, every second pixel of P5 (Lin et al., "Feature Pyramid Networks", CVPR 2017)."""

    levels = (6,)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the level to ``results`` and its name to ``names``."""
        return [*results, F.max_pool2d(results[-1], kernel_size=1, stride=2)], [*names, "p6"]


class ConvolvedTop(P6P7, ExtraFPNBlock):
    """:class:`dyhead.layers.P6P7` in the form that torchvision's pyramid asks for."""

    levels = (6, 7)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the levels to ``results`` and their names to ``names``; ``x`` are the network's stages."""
        top = super().forward(results[-1] if self.in_feature == "p5" else x[-1])
        return [*results, *(level.to(results[-1].dtype) for level in top)], [*names, "p6", "p7"]


def build_pyramid(cfg: CfgNode) -> Pyramid:
    """The pyramid of ``MODEL.BACKBONE``, the network's node, ``FPN`` and ``NECKS``, with random weights.

    Raises:
        ConfigError, ValueError: channels or groups that do not fit each other.
    """
    network = network_of(cfg)
    if has_simple_pyramid(cfg):
        pyramid = _build_simple_pyramid(cfg)
    elif network is not None and network.has_pyramid:
        pyramid = _build_own_pyramid(cfg)
    else:
        pyramid = _build_fpn(cfg)
    names = necks_with_dyhead(cfg) if "dyhead" in cfg.MODEL.BACKBONE.NAME else cfg.MODEL.NECKS
    necks = build_necks(cfg, names, pyramid.out_channels, list(pyramid.strides.values()))
    pyramid.add_necks(necks, options_of(cfg, "MODEL.BACKBONE").size_divisibility)
    return pyramid


def _build_own_pyramid(cfg: CfgNode) -> Pyramid:
    network = build_network(cfg)
    channels = next(iter(network.channels.values()))
    return Pyramid(_named(cfg, network), channels, network.strides, network.size_divisibility)


def _build_simple_pyramid(cfg: CfgNode) -> PlainPyramid:
    network = build_network(cfg)
    simple = SimplePyramid(**simple_pyramid_arguments(cfg, network))
    return PlainPyramid(_named(cfg, network), simple, cfg.MODEL.FPN.OUT_CHANNELS)


def _build_fpn(cfg: CfgNode) -> FeaturePyramid:
    fpn, name = options_of(cfg, "MODEL.FPN"), cfg.MODEL.BACKBONE.NAME
    body, widths = (_build_resnet if network_of(cfg) is None else _build_stages)(cfg)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    convolved, source = BACKBONES[name]
    source = source or fpn.p6p7_in_feature
    top = PooledTop()
    if convolved:
        top = ConvolvedTop(channels if source == "p5" else widths["res5"], channels, source, relu=fpn.p7_relu)
    return FeaturePyramid(body, widths, channels, top, build_norm(cfg.MODEL.FPN.NORM))


def build_norm(name: str) -> Callable[[int], nn.Module] | None:
    """The normalisation layer that Detectron2 calls ``name``, as a function of the channels; None for no layer."""
    return _NORMS[name]


def _build_stages(cfg: CfgNode) -> tuple[nn.Module, dict[str, int]]:
    network, wanted = build_network(cfg), cfg.MODEL.FPN.IN_FEATURES
    there = list(network.channels)
    if wanted != there[-len(wanted) :] or there[-1] != "res5":
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: the torchvision engine expects the last of the maps of {network_of(cfg).node}, "
            f"{there}, up to res5, got {wanted}"
        )
    return _named(cfg, network), {name: network.channels[name] for name in wanted}


def _named(cfg: CfgNode, network: nn.Module) -> nn.Module:
    """A network whose keys begin with its name, as in the Detectron2 engine."""
    return nn.Sequential(OrderedDict({network_of(cfg).name: network}))


def _build_resnet(cfg: CfgNode) -> tuple[nn.Module, dict[str, int]]:
    options = cfg.MODEL.RESNETS
    resnet = getattr(torchvision.models, f"resnet{options.DEPTH}")(
        weights=None,
        norm_layer=build_norm(options.NORM),
        **({"groups": options.NUM_GROUPS, "width_per_group": options.WIDTH_PER_GROUP} if options.DEPTH >= 50 else {}),
    )
    if options.STRIDE_IN_1X1 and options.DEPTH >= 50:
        for stage in (resnet.layer2, resnet.layer3, resnet.layer4):
            block = stage[0]  # torchvision strides its 3x3 convolution
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    for number, deformable in enumerate(options.DEFORM_ON_PER_STAGE, 1):
        for block in getattr(resnet, f"layer{number}") if deformable else ():
            block.conv2 = DeformConv2dPack(
                block.conv2, modulated=options.DEFORM_MODULATED, offset_groups=options.DEFORM_NUM_GROUPS
            )
    stages = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    for name in chain.from_iterable(stages[: max(cfg.MODEL.BACKBONE.FREEZE_AT, 0)]):
        getattr(resnet, name).requires_grad_(False)
        setattr(resnet, name, _freeze_batch_norm(getattr(resnet, name)))
    wanted = cfg.MODEL.FPN.IN_FEATURES
    body = IntermediateLayerGetter(resnet, {f"layer{_number(stage) - 1}": stage for stage in wanted})
    return body, {stage: resnet.inplanes // 2 ** (5 - _number(stage)) for stage in wanted}


def _number(stage: str) -> int:
    return int(stage.removeprefix("res"))


def _freeze_batch_norm(module: nn.Module) -> nn.Module:
    """``module`` with every batch normalisation in it replaced by one whose statistics do not follow the data."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _freeze_batch_norm(child))
    return module
