"""The pyramid that the detectors stand on: ResNet, FPN, extra levels and DyHead.

N batch, C channels, H, W height and width of a level in its own pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from dyhead.layers import DyHead

_NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "": None,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
}


class DyHeadPyramid(BackboneWithFPN):
    """ResNet with a feature pyramid and DyHead on it; torchvision's detectors take it as their backbone.

    Args:
        resnet: a ResNet of torchvision.
        in_stages: the stages the pyramid is built on, from fine to coarse and up to the last, such as
            ``["res3", "res4", "res5"]``.
        channels: channels C of every level of the pyramid.
        top: makes the coarser levels from the pyramid and the stages.
        dyhead: the head on the pyramid.
        norm: normalisation in the pyramid's convolutions, none by default.
        out_levels: the levels that are returned, all by default.

    Attributes:
        out_channels: channels C.
        strides: for every level that is returned, fine to coarse, the distance of its pixels, in pixels of the picture.

    Raises:
        ValueError: ``out_levels`` names a level that is not there.
    """

    def __init__(
        self,
        resnet: torchvision.models.ResNet,
        in_stages: list[str],
        channels: int,
        top: PooledTop | ConvolvedTop,
        dyhead: DyHead,
        norm: Callable[[int], nn.Module] | None = None,
        out_levels: Iterable[str] | None = None,
    ) -> None:
        numbers = [int(stage.removeprefix("res")) for stage in in_stages]
        super().__init__(
            resnet,
            return_layers={f"layer{n - 1}": f"p{n}" for n in numbers},
            in_channels_list=[resnet.inplanes // 2 ** (5 - n) for n in numbers],
            out_channels=channels,
            extra_blocks=top,
            norm_layer=norm,
        )
        self.dyhead = dyhead
        strides = {f"p{n}": 2**n for n in (*numbers, *top.levels)}
        unknown = [name for name in out_levels or () if name not in strides]
        if unknown:
            raise ValueError(f"the pyramid has the levels {', '.join(strides)}, not {', '.join(unknown)}")
        self.strides = {name: s for name, s in strides.items() if out_levels is None or name in out_levels}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) to the levels (N, C, H / stride, W / stride, sizes rounded up), by name."""
        levels = self.dyhead(super().forward(x))
        return OrderedDict((name, levels[name]) for name in self.strides)


class PooledTop(ExtraFPNBlock):
    """P6, every second pixel of P5 (Lin et al., "Feature Pyramid Networks", CVPR 2017)."""

    levels = (6,)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the level to ``results`` and its name to ``names``."""
        return [*results, F.max_pool2d(results[-1], kernel_size=1, stride=2)], [*names, "p6"]


class ConvolvedTop(ExtraFPNBlock):
    """P6 and P7, by convolutions of stride 2 (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017).

    Args:
        in_channels: channels of the level that P6 is computed from.
        channels: channels C of the pyramid.
        from_p5: compute P6 from P5 of the pyramid, not from the last stage of the network.
    """

    levels = (6, 7)

    def __init__(self, in_channels: int, channels: int, *, from_p5: bool) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels if from_p5 else in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.from_p5 = from_p5
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the levels to ``results`` and their names to ``names``; ``x`` are the network's stages."""
        p5 = results[-1]
        # Not in half precision: in bfloat16 on a CPU, PyTorch 2.15 leaves parts of the weights' gradient uninitialised
        # where the input of a strided convolution is one pixel wide, as these levels of small pictures are.
        with torch.autocast(p5.device.type, enabled=False):
            p6 = self.p6((p5 if self.from_p5 else x[-1]).float())
            p7 = self.p7(F.relu(p6))
        return [*results, p6.to(p5.dtype), p7.to(p5.dtype)], [*names, "p6", "p7"]


def build_pyramid(cfg: CfgNode, out_levels: Iterable[str] | None = None) -> DyHeadPyramid:
    """The pyramid of ``MODEL.BACKBONE``, ``RESNETS``, ``FPN`` and ``DYHEAD``, with random weights.

    Args:
        cfg: the configuration.
        out_levels: the levels that are returned, all by default.

    Raises:
        ValueError: levels that are not there, channels or groups that do not fit each other.
    """
    resnet = _build_resnet(cfg)
    fpn, options = cfg.MODEL.FPN, cfg.MODEL.DYHEAD
    dyhead = DyHead(
        fpn.OUT_CHANNELS,
        options.NUM_BLOCKS,
        block=options.BLOCK,
        window=options.WINDOW,
        scale_aware=options.SCALE_AWARE,
        spatial_aware=options.SPATIAL_AWARE,
        task_aware=options.TASK_AWARE,
        offset_groups=options.OFFSET_GROUPS,
        norm_groups=options.NORM_GROUPS,
    )
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_dyhead_backbone":
        top = PooledTop()
    else:
        top = ConvolvedTop(resnet.inplanes, fpn.OUT_CHANNELS, from_p5=fpn.P6P7_IN_FEATURE == "p5")
    return DyHeadPyramid(resnet, fpn.IN_FEATURES, fpn.OUT_CHANNELS, top, dyhead, build_norm(fpn.NORM), out_levels)


def build_norm(name: str) -> Callable[[int], nn.Module] | None:
    """The normalisation layer that Detectron2 calls ``name``, as a function of the channels; None for no layer."""
    return _NORMS[name]


def _build_resnet(cfg: CfgNode) -> torchvision.models.ResNet:
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
    stages = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
    for name in chain.from_iterable(stages[: max(cfg.MODEL.BACKBONE.FREEZE_AT, 0)]):
        getattr(resnet, name).requires_grad_(False)
        setattr(resnet, name, _freeze_batch_norm(getattr(resnet, name)))
    return resnet


def _freeze_batch_norm(module: nn.Module) -> nn.Module:
    """``module`` with every batch normalisation in it replaced by one whose statistics do not follow the data."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _freeze_batch_norm(child))
    return module
