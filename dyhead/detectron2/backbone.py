"""The Dynamic Head on any Detectron2 backbone that puts out a pyramid, and registered ResNet-FPN builders with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from dyhead.config import ConfigError
from dyhead.layers import DyHead


class DyHeadBackbone(Backbone):
    """A backbone with a pyramid (ResNet-FPN, RegNet-FPN, Swin-FPN, ViTDet, ...) and the Dynamic Head on all its levels.

    To the detector it is a backbone of the same output shapes, so it goes wherever the wrapped one went (Fig. 2b of the
    paper, and the pyramid form for two-stage detectors).

    Args:
        backbone: what makes the pyramid. Levels have equal channels, and the stride doubles from level to level.
        num_blocks: DyHead blocks; 0 leaves the pyramid as it is.
        block, window, scale_aware, spatial_aware, task_aware, offset_groups, norm_groups: see
            :class:`dyhead.layers.DyHead`.

    Called with a config instead, ``DyHeadBackbone(cfg, backbone)``, it takes all but the backbone from
    ``MODEL.DYHEAD``.

    A state dict with the keys of the wrapped backbone alone (``bottom_up.stem.conv1.weight``), as detectors without a
    Dynamic Head have them, loads into the wrapped backbone.

    Raises:
        ValueError: the output of ``backbone`` is no pyramid (the levels are named), or DyHead refuses an option.

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
    def __init__(
        self,
        backbone: Backbone,
        *,
        num_blocks: int = 6,
        block: str = "paper",
        window: int | None = 1,
        scale_aware: bool = True,
        spatial_aware: bool = True,
        task_aware: bool = True,
        offset_groups: int = 1,
        norm_groups: int = 16,
    ) -> None:
        super().__init__()
        shapes = backbone.output_shape()
        self._levels = sorted(shapes, key=lambda name: shapes[name].stride)
        self._shapes = {name: shapes[name] for name in self._levels}
        self.backbone = backbone
        self.dyhead = DyHead(
            _pyramid_channels(self._shapes),
            num_blocks,
            block=block,
            window=window,
            scale_aware=scale_aware,
            spatial_aware=spatial_aware,
            task_aware=task_aware,
            offset_groups=offset_groups,
            norm_groups=norm_groups,
        )
        self.register_load_state_dict_pre_hook(_wrap_keys)

    @classmethod
    def from_config(cls, cfg: CfgNode, backbone: Backbone) -> dict[str, Any]:
        """The keyword arguments that ``MODEL.DYHEAD`` stands for."""
        options = {name.lower(): value for name, value in cfg.MODEL.DYHEAD.items()}
        return {"backbone": backbone, **options}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) in, the pyramid after the Dynamic Head out, by level, fine to coarse."""
        pyramid = self.backbone(x)
        return self.dyhead({name: pyramid[name] for name in self._levels})

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every level, those of the wrapped backbone, fine to coarse."""
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        """What the wrapped backbone asks of the picture's size."""
        return self.backbone.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What the wrapped backbone asks of the picture's padding."""
        return self.backbone.padding_constraints


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DyHeadBackbone:
    """ResNet-FPN with a pooled last level (p2 to p6 from res2 to res5) and DyHead: for two-stage detectors."""
    return DyHeadBackbone(cfg, _fpn(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool()))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_dyhead_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DyHeadBackbone:
    """ResNet-FPN with convolved P6 and P7 (p3 to p7 from res3 to res5) and DyHead: for one-stage detectors.

    ``MODEL.FPN.P6P7_IN_FEATURE`` says what P6 is computed from: "p5" or "res5".
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    in_feature = cfg.MODEL.FPN.P6P7_IN_FEATURE
    if in_feature not in ("p5", "res5"):
        raise ConfigError(f"MODEL.FPN.P6P7_IN_FEATURE: expected 'p5' or 'res5', got {in_feature!r}")
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    in_channels = out_channels if in_feature == "p5" else resnet.output_shape()["res5"].channels
    return DyHeadBackbone(cfg, _fpn(cfg, resnet, LastLevelP6P7(in_channels, out_channels, in_feature)))


def require_dyhead(backbone: Backbone, detector: str) -> None:
    """Raise :class:`ConfigError` unless ``backbone``, which ``detector`` was given, is a :class:`DyHeadBackbone`."""
    if not isinstance(backbone, DyHeadBackbone):
        names = [name for name, _ in BACKBONE_REGISTRY if "dyhead" in name]
        raise ConfigError(
            f"{detector}: expected a backbone with a Dynamic Head (DyHeadBackbone, or MODEL.BACKBONE.NAME one of "
            f"{', '.join(names)}), got {type(backbone).__name__}"
        )


def _wrap_keys(module: DyHeadBackbone, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before ``module`` loads: give the keys of its wrapped backbone the prefix that they have inside it, in place."""
    own = set(module.state_dict())
    for name in module.backbone.state_dict():
        if prefix + name in state_dict and name not in own:
            state_dict[f"{prefix}backbone.{name}"] = state_dict.pop(prefix + name)


def _fpn(cfg: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up,
        cfg.MODEL.FPN.IN_FEATURES,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _pyramid_channels(shapes: dict[str, ShapeSpec]) -> int:
    """The channels that all levels share, after checking that ``shapes``, sorted by stride, are a pyramid's."""
    if not shapes:
        raise ValueError("backbone: expected a pyramid of at least one level, got no output")
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
