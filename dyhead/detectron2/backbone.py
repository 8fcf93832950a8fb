"""Necks on any Detectron2 backbone that puts out a pyramid, and registered builders of backbones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling import build_backbone as build_detectron2_backbone
from detectron2.modeling import build_resnet_backbone as build_detectron2_resnet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from dyhead.backbones import NETWORKS, Registered, SimplePyramid
from dyhead.build import build_necks, build_network, necks_with_dyhead, simple_pyramid_arguments
from dyhead.config import options_of
from dyhead.detectron2.deform_conv import use_own_deform_conv
from dyhead.layers import P6P7
from dyhead.necks import DyHeadOptions, Necked, Stack


class NeckBackbone(Necked, Backbone):
    """A backbone with a pyramid (ResNet-FPN, RegNet-FPN, Swin-FPN, ViTDet, ...) and necks on all its levels.

    To the detector it is a backbone of the same output shapes, so it goes wherever the wrapped one went.

    A state dict with the keys of the wrapped backbone alone (``bottom_up.stem.conv1.weight``), as detectors without
    necks have them, loads into the wrapped backbone.

    Args:
        backbone: what makes the pyramid. Levels have equal channels, and the stride doubles from level to level.
        necks: by name, in their order; the names become those of the children.
        size_divisibility: images are padded to multiples of it, in pixels; 0: of what backbone and necks ask for.

    Raises:
        ValueError: the output of ``backbone`` is not a valid pyramid (the levels are named).
    """

    def __init__(self, backbone: Backbone, necks: Stack, size_divisibility: int = 0) -> None:
        super().__init__()
        self._shapes = _by_stride(backbone.output_shape())
        self._levels = list(self._shapes)
        self._channels = _pyramid_channels(self._shapes)
        self.backbone = backbone
        self.attach(necks.named_children())
        self._size_divisibility = size_divisibility or math.lcm(
            max(backbone.size_divisibility, 1), necks.size_divisibility
        )
        self.register_load_state_dict_pre_hook(_wrap_keys)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) in, the pyramid after the necks out, by level, fine to coarse."""
        pyramid = self.backbone(x)
        return self.through_necks({name: pyramid[name] for name in self._levels})

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level, those of the wrapped backbone, fine to coarse."""
        return self._shapes

    @property
    def out_channels(self) -> int:
        """Channels of every level."""
        return self._channels

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of it, in pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What the wrapped backbone asks of the image's padding."""
        return self.backbone.padding_constraints


class DyHeadBackbone(NeckBackbone):
    """A backbone with a pyramid and the Dynamic Head on all its levels (Fig. 2b of the paper).

    Args:
        backbone: see :class:`NeckBackbone`.
        out_channels: channels of the levels, for LazyConfig, where other parts say ``${..backbone.out_channels}``; it
            changes nothing.
        **dyhead: the arguments of :class:`dyhead.layers.DyHead` but for the channels.

    Called with a config instead, ``DyHeadBackbone(cfg, backbone)``, it takes all but the backbone from
    ``MODEL.DYHEAD``.

    Raises:
        ValueError: the output of ``backbone`` is not a valid pyramid, or has not ``out_channels``; or DyHead refuses an
            option.
        TypeError: an argument that DyHead does not have.

    Example:
        >>> from detectron2.modeling import FPN
        >>> from detectron2.modeling.backbone.regnet import SimpleStem, RegNet, ResBottleneckBlock
        >>> regnet = RegNet(stem_class=SimpleStem, stem_width=32, block_class=ResBottleneckBlock, depth=23, w_a=38.65,
        ...                 w_0=96, w_m=2.43, group_width=40, norm="BN", out_features=["s1", "s2", "s3", "s4"])
        >>> backbone = DyHeadBackbone(FPN(regnet, ["s1", "s2", "s3", "s4"], out_channels=64), num_blocks=2)
        >>> backbone.output_shape()["p3"]
        ShapeSpec(channels=64, height=None, width=None, stride=8)
    """

    @configurable
    def __init__(self, backbone: Backbone, out_channels: int | None = None, **dyhead: Any) -> None:
        options, shapes = DyHeadOptions(**dyhead), backbone.output_shape()
        channels = _pyramid_channels(shapes)
        if out_channels not in (None, channels):
            raise ValueError(f"out_channels: expected {channels}, those of the backbone's levels, got {out_channels}")
        divisor = options.size_divisibility([shape.stride for shape in shapes.values()])
        super().__init__(backbone, Stack({"dyhead": options.build(channels)}, [divisor]))

    @classmethod
    def from_config(cls, cfg: CfgNode, backbone: Backbone) -> dict[str, Any]:
        """The keyword arguments that ``MODEL.DYHEAD`` stands for."""
        return {"backbone": backbone, **asdict(options_of(cfg, "MODEL.DYHEAD"))}


def build_backbone(cfg: CfgNode) -> Backbone:
    """The backbone of ``MODEL.BACKBONE.NAME`` with the necks of ``MODEL.NECKS``, for the detectors of this package.

    Raises:
        ConfigError: necks that cannot be built as configured.
    """
    backbone = use_own_deform_conv(build_detectron2_backbone(cfg))
    return backbone if isinstance(backbone, NeckBackbone) else _with_necks(cfg, backbone, cfg.MODEL.NECKS)


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_p6p7_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet-FPN with convolved P6 and P7 (p3 to p7 from res3 to res5): for one-stage detectors.

    ``MODEL.FPN.P6P7_IN_FEATURE`` says what P6 is computed from, "p5" or "res5", and ``P7_RELU`` how P7 is.
    """
    return _fpn(cfg, _resnet(cfg, input_shape), p6p7=True)


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NeckBackbone:
    """ResNet-FPN with a pooled last level (p2 to p6 from res2 to res5) and DyHead: for two-stage detectors.

    It gives DyHead to meta-architectures that do not know ``MODEL.NECKS``, such as Detectron2's own.
    """
    fpn = _fpn(cfg, _resnet(cfg, input_shape), p6p7=False)
    return _with_necks(cfg, fpn, necks_with_dyhead(cfg))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> NeckBackbone:
    """:func:`build_resnet_fpn_p6p7_backbone` with DyHead, for any one-stage meta-architecture."""
    return _with_necks(cfg, build_resnet_fpn_p6p7_backbone(cfg, input_shape), necks_with_dyhead(cfg))


class NetworkBackbone(Backbone):
    """A network of :mod:`dyhead.backbones` in Detectron2's form: stages for FPN.

    Args:
        name: of the network, which its keys begin with.
        network: from images to maps by name, with their ``channels`` and ``strides``.

    Example:
        >>> from dyhead.backbones import TimmOptions
        >>> network = TimmOptions("resnet18d").build()                                              # doctest: +SKIP
        >>> DyHeadBackbone(FPN(NetworkBackbone("timm", network), ["res3", "res4", "res5"], 256))    # doctest: +SKIP
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.add_module(name, network)
        self._name = name

    @property
    def network(self) -> nn.Module:
        """The network."""
        return getattr(self, self._name)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the network's maps, by name."""
        return self.network(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map."""
        strides, channels = self.network.strides, self.network.channels
        return {name: ShapeSpec(channels=width, stride=strides[name]) for name, width in channels.items()}


class NetworkPyramid(Backbone):
    """A network of :mod:`dyhead.backbones` whose maps are a pyramid, in Detectron2's form.

    Args:
        name: of the network, which its keys begin with after ``bottom_up``.
        network: from images to levels by name, with their ``channels``, ``strides`` and ``size_divisibility``.
    """

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.bottom_up = NetworkBackbone(name, network)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels, by name."""
        return self.bottom_up(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        return self.bottom_up.output_shape()

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of it, in pixels."""
        return self.bottom_up.network.size_divisibility


class SimplePyramidBackbone(SimplePyramid, Backbone):
    """A network and ViTDet's pyramid in Detectron2's form.

    Args:
        bottom_up: the network, with a map "res4".
        in_channels, out_channels, kwargs: of :class:`dyhead.backbones.SimplePyramid`.
    """

    def __init__(self, bottom_up: Backbone, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.bottom_up = bottom_up
        self._channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels, by name."""
        return super().forward(self.bottom_up(x))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level."""
        return {name: ShapeSpec(channels=self._channels, stride=stride) for name, stride in self.strides.items()}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of it, in pixels: the stride of P5."""
        return 32


def _register(network: Registered) -> None:
    """Let Detectron2 know the builders of a network."""

    def own(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        return NetworkPyramid(network.name, build_network(cfg))

    def pooled(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _fpn(cfg, NetworkBackbone(network.name, build_network(cfg)), p6p7=False)

    def convolved(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        return _fpn(cfg, NetworkBackbone(network.name, build_network(cfg)), p6p7=True)

    def simple(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramidBackbone:
        built = build_network(cfg)
        return SimplePyramidBackbone(NetworkBackbone(network.name, built), **simple_pyramid_arguments(cfg, built))

    def simple_convolved(cfg: CfgNode, input_shape: ShapeSpec) -> SimplePyramidBackbone:
        return simple(cfg, input_shape)

    own.__doc__ = f"The network of ``{network.node}``, whose maps are a pyramid already."
    pooled.__doc__ = f"FPN on the network of ``{network.node}``, with a pooled last level (p2 to p6 from res2 to res5)."
    convolved.__doc__ = (
        f"FPN on the network of ``{network.node}``, with convolved P6 and P7, as in `build_resnet_fpn_p6p7_backbone`."
    )
    plain = f"ViTDet's pyramid on the network of ``{network.node}``, with"
    simple.__doc__ = f"{plain} a pooled last level (p2 to p6 from res4)."
    simple_convolved.__doc__ = f"{plain} convolved P6 and P7 (p3 to p7 from res4)."
    builders = (own,) if network.has_pyramid else (pooled, convolved)
    if network.may_be_plain:
        builders += (simple, simple_convolved)
    for name, build in zip(network.builders, builders, strict=True):
        build.__name__ = name
        BACKBONE_REGISTRY.register(build)


for _network in NETWORKS.values():
    _register(_network)


def _resnet(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return use_own_deform_conv(build_detectron2_resnet(cfg, input_shape))


def _with_necks(cfg: CfgNode, backbone: Backbone, names: Sequence[str]) -> NeckBackbone:
    shapes = backbone.output_shape()
    necks = build_necks(cfg, names, _pyramid_channels(shapes), [shape.stride for shape in shapes.values()])
    return NeckBackbone(backbone, necks, options_of(cfg, "MODEL.BACKBONE").size_divisibility)


def _wrap_keys(module: NeckBackbone, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before ``module`` loads: give the keys of its wrapped backbone the prefix that they have inside it, in place."""
    own = set(module.state_dict())
    for name in module.backbone.state_dict():
        if prefix + name in state_dict and name not in own:
            state_dict[f"{prefix}backbone.{name}"] = state_dict.pop(prefix + name)


def _fpn(cfg: CfgNode, bottom_up: Backbone, *, p6p7: bool) -> FPN:
    top_block: nn.Module = LastLevelMaxPool()
    if p6p7:
        options, channels = options_of(cfg, "MODEL.FPN"), cfg.MODEL.FPN.OUT_CHANNELS
        source = options.p6p7_in_feature
        in_channels = channels if source == "p5" else bottom_up.output_shape()["res5"].channels
        top_block = P6P7(in_channels, channels, source, relu=options.p7_relu)
    return FPN(
        bottom_up,
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _by_stride(shapes: dict[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    return dict(sorted(shapes.items(), key=lambda item: item[1].stride))


def _pyramid_channels(shapes: dict[str, ShapeSpec]) -> int:
    """The channels that all levels share, after checking that they are a pyramid's."""
    if not shapes:
        raise ValueError("backbone: expected a pyramid of at least one level, got no output")
    shapes = _by_stride(shapes)
    first, channels = next((name, shape.channels) for name, shape in shapes.items())
    for name, shape in shapes.items():
        if shape.channels != channels:
            raise ValueError(f"level {name}: expected {channels} channels as in level {first}, got {shape.channels}")
    for finer, name in pairwise(shapes):
        if shapes[name].stride != 2 * shapes[finer].stride:
            raise ValueError(
                f"level {name}: expected stride {2 * shapes[finer].stride}, twice that of level {finer}, "
                f"got {shapes[name].stride}"
            )
    return channels
