"""The network that Hit-Detector (Guo et al., CVPR 2020) found: its backbone, and its neck in a pyramid's place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.backbones.registry import register_network
from dyhead.layers.conv_norm import ConvNorm
from dyhead.layers.inverted_residual import InvertedResidual, SeparableConv
from dyhead.options import at_least, one_of, option

# The inverted residual blocks of the backbone, behind a 3x3 convolution of stride 2 to 16 channels, by what they put
# out: channels, the first block's stride, and each block's kernel, expansion and dilation.
_STAGES = (
    (48, 2, ((3, 3, 1), (3, 3, 1), (3, 3, 2), (3, 3, 1))),
    (96, 2, ((5, 6, 1), (5, 6, 1), (3, 3, 1), (3, 3, 1))),
    (184, 2, ((7, 6, 1), (5, 6, 1), (5, 6, 2), (5, 3, 1))),
    (256, 1, ((5, 6, 1), (5, 6, 2), (5, 6, 1), (5, 6, 2))),
    (352, 2, ((7, 6, 1), (5, 6, 1), (5, 6, 2), (5, 6, 1))),
    (1024, 1, ((3, 3, 1),)),
)
_STEM, _LAST = 16, 2048
# The layer behind which each map is read, and its channels.
_TAPS = {"res2": 4, "res3": 8, "res4": 16, "res5": 22}
_CHANNELS = {"res2": 48, "res3": 96, "res4": 256, "res5": _LAST}
# Kernel and dilation of the neck's separable convolutions, fine to coarse: before the top-down sums, and after them.
_BEFORE = ((5, 3), (5, 3), (5, 2), (3, 3))
_AFTER = ((3, 3), (5, 3), (5, 3), (3, 3))


class HitDetectorNetwork(nn.Module):
    """The backbone that Hit-Detector found: a 3x3 convolution, 21 inverted residual blocks, a 1x1 convolution.

    Args:
        norm: "BN", "SyncBN" or "FrozenBN".
        last: the coarsest map; layers behind it are left out.

    Attributes:
        channels: of each map, by its name, from fine to coarse.
        strides: likewise, in pixels of the image.
    """

    def __init__(self, norm: str, last: str = "res5") -> None:
        super().__init__()
        self.channels = {name: width for name, width in _CHANNELS.items() if _TAPS[name] <= _TAPS[last]}
        self.strides = {name: 2 ** int(name.removeprefix("res")) for name in self.channels}
        # The first convolution has a bias, although a norm follows.
        self.blocks = nn.ModuleList([ConvNorm(3, _STEM, 3, norm, stride=2, bias=True)])
        width = _STEM
        for channels, first_stride, rows in _STAGES:
            for i, (kernel_size, expansion, dilation) in enumerate(rows):
                stride = 1 if i else first_stride
                self.blocks.append(
                    InvertedResidual(width, channels, kernel_size, expansion, norm, stride=stride, dilation=dilation)
                )
                width = channels
        self.blocks.append(ConvNorm(width, _LAST, 1, norm))
        del self.blocks[_TAPS[last] + 1 :]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to maps (N, C, H / stride, W / stride, sizes rounded up) by name, fine to coarse."""
        names, maps = {layer: name for name, layer in _TAPS.items()}, {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if isinstance(block, ConvNorm):
                x = x.relu()
            if i in names:
                maps[names[i]] = x
        return maps


class HitDetectorNeck(nn.Module):
    """The neck that Hit-Detector found, which makes a pyramid of the maps of a network.

    A separable convolution of each map, then sums from coarse to fine, then another separable convolution, then, fine
    to coarse,

        N_2 = x_2,    N_{l+1} = conv3x3(max_pool2(N_l) + x_{l+1}),

    and N_6 is every second pixel of N_5.

    Args:
        widths: channels of the network's four maps, fine to coarse.
        channels: channels C of every level.
        norm: "BN", "SyncBN" or "FrozenBN".
    """

    def __init__(self, widths: Sequence[int], channels: int, norm: str) -> None:
        super().__init__()
        inputs = [*widths, *[channels] * len(_AFTER)]
        self.cells = nn.ModuleList(
            SeparableConv(width, channels, kernel_size, norm, dilation=dilation)
            for width, (kernel_size, dilation) in zip(inputs, _BEFORE + _AFTER, strict=True)
        )
        self.bottom_up = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths[1:])
        for conv in self.bottom_up:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps "res2" to "res5", each half the size of the one before it, rounded up, to the levels "p2" to "p6"."""
        levels = [cell(x) for cell, x in zip(self.cells[: len(maps)], maps.values(), strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[2:]).to(levels[i].dtype)
        levels = [cell(x) for cell, x in zip(self.cells[len(levels) :], levels, strict=True)]
        out = levels[:1]
        for conv, level in zip(self.bottom_up, levels[1:], strict=True):
            out.append(conv(F.max_pool2d(out[-1], 2, ceil_mode=True) + level))
        out.append(out[-1][:, :, ::2, ::2])
        return {f"p{i}": level for i, level in enumerate(out, 2)}


class HitDetectorPyramid(nn.Module):
    """The backbone and the neck that Hit-Detector found.

    Args:
        options: of both.

    Attributes:
        channels: of each level, by its name, from fine to coarse: those of the options.
        strides: likewise, in pixels of the image.
        size_divisibility: 32, in pixels; with other sizes the neck's sums round up.
    """

    size_divisibility = 32

    def __init__(self, options: HitDetectorPyramidOptions) -> None:
        super().__init__()
        self.backbone = HitDetectorNetwork(options.norm)
        self.neck = HitDetectorNeck(list(self.backbone.channels.values()), options.out_channels, options.neck_norm)
        self.strides = {f"p{number}": 2**number for number in range(2, 7)}
        self.channels = dict.fromkeys(self.strides, options.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to levels (N, C, H / stride, W / stride, sizes rounded up) by name, fine to coarse."""
        return self.neck(self.backbone(x))


_NORM_DOC = "after each convolution of the {}; {}SyncBN has the statistics of all devices, as the authors trained it"


@register_network("hit_detector")
@dataclass(frozen=True)
class HitDetectorOptions:
    """The network of ``build_hit_detector_fpn_backbone`` and ``build_hit_detector_fpn_p6p7_backbone``.

    It is the backbone that Hit-Detector found, with FPN on it. Its maps are ``res2`` at 4 pixels to ``res5`` at 32;
    ``MODEL.FPN.IN_FEATURES`` chooses among them. ``MODEL.WEIGHTS`` may be the authors' file of it.
    """

    norm: str = option(
        "SyncBN",
        _NORM_DOC.format("backbone", "FrozenBN keeps what the weights have; "),
        one_of("BN", "SyncBN", "FrozenBN"),
    )

    @property
    def title(self) -> str:
        """What tables call the network."""
        return "Hit-Detector's backbone"

    def check(self) -> None:
        """Nothing beyond the options' own checks."""

    def build(self, wanted: Collection[str] | None = None) -> HitDetectorNetwork:
        """The network up to the last of the maps ``wanted``, with random weights."""
        return HitDetectorNetwork(self.norm, max((name for name in _TAPS if name in (wanted or _TAPS)), default="res5"))


@register_network("hit_detector_pyramid", has_pyramid=True)
@dataclass(frozen=True)
class HitDetectorPyramidOptions(HitDetectorOptions):
    """The network of ``build_hit_detector_pyramid_backbone``: the backbone and the neck that Hit-Detector found.

    The neck takes FPN's place; its levels are ``p2`` to ``p6``. ``MODEL.WEIGHTS`` may be the authors' file of the
    backbone.
    """

    neck_norm: str = option(
        "SyncBN", _NORM_DOC.format("neck, but those of its bottom-up path", ""), one_of("BN", "SyncBN")
    )
    out_channels: int = option(256, "channels of every level", at_least(1))

    @property
    def title(self) -> str:
        """What tables call the network."""
        return "Hit-Detector's backbone and neck"

    def build(self, wanted: Collection[str] | None = None) -> HitDetectorPyramid:
        """The network, with random weights; ``wanted`` changes nothing."""
        return HitDetectorPyramid(self)
