"""The pyramid that the detectors stand on: ResNet or a network of timm, FPN, extra levels and necks.

N batch, C channels, H, W height and width of a level in its own pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain

import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dyhead.backbones import SimplePyramid
from dyhead.build import build_necks, build_timm, necks_with_dyhead, simple_pyramid_arguments
from dyhead.config import ConfigError, has_simple_pyramid, has_timm, options_of
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

#: ``MODEL.BACKBONE.NAME``: whether P6 and P7 are convolved (else P6 is pooled), and what from, where the name says it.
BACKBONES: dict[str, tuple[bool, str | None]] = {
    "build_resnet_fpn_backbone": (False, None),
    "build_resnet_fpn_p6p7_backbone": (True, None),
    "build_retinanet_resnet_fpn_backbone": (True, "res5"),
    "build_resnet_fpn_dyhead_backbone": (False, None),
    "build_retinanet_resnet_fpn_dyhead_backbone": (True, None),
    "build_timm_fpn_backbone": (False, None),
    "build_timm_fpn_p6p7_backbone": (True, None),
    "build_timm_simple_pyramid_backbone": (False, None),
    "build_timm_simple_pyramid_p6p7_backbone": (True, "p5"),
}


class Pyramid(Necked):
    """A network with a feature pyramid and necks on it; torchvision's detectors take it as their backbone.

    Args:
        body: the network, from images to its stages by name; stage "res3" is of stride 2^3.
        stages: the stages that the pyramid is built on, from fine to coarse.
        fpn: from them, in an ordered dict, to the levels, which "p3" of stride 2^3 is one of, fine to coarse.
        strides: of the levels by name.
        channels: channels C of every level.

    Attributes:
        out_channels: channels C.
        strides: for every level, fine to coarse, the distance of its pixels, in pixels of the image.
        size_divisibility: images are padded to multiples of it, in pixels.
    """

    def __init__(
        self,
        body: nn.Module,
        stages: Iterable[str],
        fpn: FeaturePyramidNetwork | SimplePyramid,
        strides: dict[str, int],
        channels: int,
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.out_channels = channels
        self._stages = list(stages)
        self.strides = strides
        self.size_divisibility = _DIVISOR
        self.attach(())

    @property
    def laterals(self) -> dict[str, nn.Module]:
        """The convolutions of the network's stages, by the level that each is added to, if there are any."""
        if not isinstance(self.fpn, FeaturePyramidNetwork):
            return {}
        return dict(zip(map(_level, self._stages), self.fpn.inner_blocks, strict=True))

    def add_necks(self, necks: Stack, size_divisibility: int = 0) -> None:
        """Let necks follow, each a child of its own name.

        Args:
            necks: of levels with these strides and channels.
            size_divisibility: 0: what the pyramid and the necks ask for.
        """
        self.attach(necks.named_children())
        self.size_divisibility = size_divisibility or math.lcm(_DIVISOR, necks.size_divisibility)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels (N, C, H / stride, W / stride, sizes rounded up), by name."""
        stages = self.body(x)
        pyramid = self.fpn(OrderedDict((stage, stages[stage]) for stage in self._stages))
        return OrderedDict(self.through_necks(dict(zip(self.strides, pyramid.values(), strict=True))))


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
    """The pyramid of ``MODEL.BACKBONE``, ``RESNETS`` or ``TIMM``, ``FPN`` and ``NECKS``, with random weights.

    Raises:
        ConfigError, ValueError: channels or groups that do not fit each other.
    """
    name, channels = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.OUT_CHANNELS
    if has_simple_pyramid(cfg):
        network = build_timm(cfg)
        simple = SimplePyramid(**simple_pyramid_arguments(cfg, network))
        pyramid = Pyramid(network, [simple.in_feature], simple, simple.strides, channels)
    else:
        pyramid = _build_fpn(cfg, *(_build_timm if has_timm(cfg) else _build_resnet)(cfg))
    names = necks_with_dyhead(cfg) if "dyhead" in name else cfg.MODEL.NECKS
    necks = build_necks(cfg, names, channels, list(pyramid.strides.values()))
    pyramid.add_necks(necks, options_of(cfg, "MODEL.BACKBONE").size_divisibility)
    return pyramid


def _build_fpn(cfg: CfgNode, body: nn.Module, widths: Mapping[str, int]) -> Pyramid:
    """A feature pyramid network on stages of these widths, from fine to coarse and up to the last."""
    options, channels = options_of(cfg, "MODEL.FPN"), cfg.MODEL.FPN.OUT_CHANNELS
    convolved, source = BACKBONES[cfg.MODEL.BACKBONE.NAME]
    source = source or options.p6p7_in_feature
    top = PooledTop()
    if convolved:
        top = ConvolvedTop(channels if source == "p5" else widths["res5"], channels, source, relu=options.p7_relu)
    norm = build_norm(cfg.MODEL.FPN.NORM)
    fpn = FeaturePyramidNetwork(list(widths.values()), channels, extra_blocks=top, norm_layer=norm)
    strides = {f"p{n}": 2**n for n in (*map(_number, widths), *top.levels)}
    return Pyramid(body, widths, fpn, strides, channels)


def build_norm(name: str) -> Callable[[int], nn.Module] | None:
    """The normalisation layer that Detectron2 calls ``name``, as a function of the channels; None for no layer."""
    return _NORMS[name]


def _build_timm(cfg: CfgNode) -> tuple[nn.Module, dict[str, int]]:
    network, wanted = build_timm(cfg), cfg.MODEL.FPN.IN_FEATURES
    there = list(network.channels)
    if wanted != there[-len(wanted) :] or there[-1] != "res5":
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: the torchvision engine expects the last of the maps of MODEL.TIMM.OUT_INDICES, "
            f"{there}, up to res5, got {wanted}"
        )
    return network, {name: network.channels[name] for name in wanted}


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


def _level(stage: str) -> str:
    return f"p{_number(stage)}"


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
