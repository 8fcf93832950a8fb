"""SpineNet (Du et al., "SpineNet: Learning Scale-Permuted Backbone for Recognition and Localization", CVPR 2020).

Its blocks do not go from fine to coarse: a search found their scales, and from which two others each is computed. The
last five are a pyramid, P3 to P7.

N batch, C channels, H, W height and width of a map in its own pixels.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.backbones.registry import register_network
from dyhead.options import at_least, below, one_of, option

_DIVISOR = 128  # the stride of P7
_STEM = 64
_WIDTHS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}  # of level 2, ...
_EXPANSION = 4  # of bottlenecks


@dataclass(frozen=True)
class Block:
    """What the search found of a block.

    Attributes:
        level: its pixels are 2^level pixels of the image apart.
        bottleneck: whether it has convolutions of 1x1, 3x3 and 1x1 pixels, or two of 3x3.
        inputs: the numbers of the blocks that it is computed from, resampled to its level.
        added: of those that are added to these as they are: each output takes what no block before it has read.
    """

    level: int
    bottleneck: bool = True
    inputs: tuple[int, ...] = ()
    added: tuple[int, ...] = ()

    def width(self, scale: float) -> int:
        """Channels of its inner convolutions."""
        return int(_WIDTHS[self.level] * scale)

    def channels(self, scale: float) -> int:
        """Channels of its output."""
        return self.width(scale) * (_EXPANSION if self.bottleneck else 1)


#: The blocks by number; the first two follow the stem.
BLOCKS = (
    Block(2),
    Block(2),
    Block(2, inputs=(0, 1)),
    Block(4, False, (0, 1)),
    Block(3, inputs=(2, 3)),
    Block(4, inputs=(2, 4)),
    Block(6, False, (3, 5)),
    Block(4, inputs=(3, 5)),
    Block(5, False, (6, 7)),
    Block(7, False, (6, 8)),
    Block(5, inputs=(8, 9)),
    Block(5, inputs=(8, 10)),
    Block(4, inputs=(5, 10)),
    Block(3, inputs=(4, 10)),
    Block(5, inputs=(7, 12), added=(11,)),
    Block(7, inputs=(5, 14)),
    Block(6, inputs=(12, 14)),
)
#: The number of the block that each level of the pyramid is computed from.
OUTPUTS = {3: 13, 4: 12, 5: 14, 6: 16, 7: 15}


@dataclass(frozen=True)
class Size:
    """What is different in the networks of the family.

    Attributes:
        scale: of all widths.
        alpha: of a block's width, in its resampling.
        repeats: so many blocks in a row are each of the found ones.
        channels: channels C of the pyramid.
    """

    scale: float
    alpha: float
    repeats: int
    channels: int


SIZES = {
    "spinenet49s": Size(0.65, 0.5, 1, 128),
    "spinenet49": Size(1.0, 0.5, 1, 256),
    "spinenet96": Size(1.0, 0.5, 2, 256),
    "spinenet143": Size(1.0, 1.0, 3, 256),
    "spinenet190": Size(1.3, 1.0, 4, 512),
}


@dataclass(frozen=True)
class Dialect:
    """What is different in three programs of the same network; weights of one compute something else in another.

    Attributes:
        eps: of batch normalization.
        momentum: of its running statistics.
        same_convs: whether convolutions of stride 2 are padded as TensorFlow's SAME, with less before than after.
        same_pools: likewise pooling.
        pool_once: whether a block that is coarser by several octaves is pooled once, or once for each.
        active_outputs: whether the outputs' normalization is followed by the activation.
    """

    eps: float
    momentum: float
    same_convs: bool
    same_pools: bool
    pool_once: bool
    active_outputs: bool


DIALECTS = {
    "port": Dialect(1e-3, 0.01, same_convs=False, same_pools=False, pool_once=True, active_outputs=False),
    "tpu": Dialect(1e-4, 0.003, same_convs=False, same_pools=True, pool_once=True, active_outputs=True),
    "garden": Dialect(1e-3, 0.01, same_convs=True, same_pools=True, pool_once=False, active_outputs=True),
}
_ACTIVATIONS = {"relu": F.relu, "swish": F.silu}
_NORMS = ("BN", "SyncBN", "FrozenBN")


@register_network("spinenet", has_pyramid=True)
@dataclass(frozen=True)
class SpineNetOptions:
    """SpineNet, the network of ``build_spinenet_backbone``. It puts out a pyramid, P3 to P7, and has no FPN.

    Images are padded to multiples of 128 pixels.
    """

    # No bare number: what merges YAML into a CfgNode takes the text "49" for one.
    name: str = option(
        "spinenet49", "which of the family; levels of 49s have 128 channels, of 190 512, of others 256", one_of(*SIZES)
    )
    dialect: str = option(
        "port",
        "the program whose weights it computes with: port, yan-roo/SpineNet-Pytorch; tpu, tensorflow/tpu, the authors' "
        "first; garden, tensorflow/models. They differ in padding, pooling, the eps of batch normalization, and "
        "whether outputs are activated",
        one_of(*DIALECTS),
    )
    activation: str = option(
        "relu", "swish in the weights that tensorflow/tpu calls best, and in tensorflow/models'", one_of(*_ACTIVATIONS)
    )
    norm: str = option(
        "BN",
        "BN wants several images on a device; SyncBN has the statistics of all devices; FrozenBN stays as in the "
        "weights",
        one_of(*_NORMS),
    )
    drop_path_rate: float = option(
        0.0,
        "of the last block, in training (stochastic depth); less in those before it, in their order",
        at_least(0) & below(1),
    )

    @property
    def title(self) -> str:
        """What tables call the network."""
        return self.name.replace("spinenet", "SpineNet-").replace("49s", "49S")

    def check(self) -> None:
        """Every combination can be built."""

    def build(self, wanted: Collection[str] | None = None) -> SpineNet:
        """The network, with random weights.

        Args:
            wanted: all levels are computed.
        """
        return SpineNet(self)


class SpineNet(nn.Module):
    """SpineNet, from images to a pyramid.

    Args:
        options: which, and what of it.

    Attributes:
        channels: of each level, by its name, from fine to coarse.
        strides: likewise, in pixels of the image.
        size_divisibility: images are padded to multiples of it, in pixels.
    """

    def __init__(self, options: SpineNetOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or SpineNetOptions()
        self.size_divisibility = _DIVISOR
        size = SIZES[options.name]
        self.channels = {f"p{level}": size.channels for level in OUTPUTS}
        self.strides = {f"p{level}": 2**level for level in OUTPUTS}
        self.stem = ConvNorm(options, 3, _STEM, 7, stride=2)
        self.blocks = nn.ModuleList()
        self.merges = nn.ModuleDict()  # of the inputs of a block, by its number
        before = _STEM
        for number, block in enumerate(BLOCKS):
            channels = block.channels(size.scale)
            if block.inputs:
                self.merges[str(number)] = nn.ModuleList(
                    Resampling(options, BLOCKS[source], block) for source in block.inputs
                )
                before = channels
            drop = options.drop_path_rate * max(number - 1, 0) / (len(BLOCKS) - 2)
            repeated = [
                ResidualBlock(options, before if i == 0 else channels, block, drop) for i in range(size.repeats)
            ]
            self.blocks.append(nn.Sequential(*repeated))
            before = channels
        self.outputs = nn.ModuleDict(
            {
                f"p{level}": ConvNorm(
                    options,
                    BLOCKS[number].channels(size.scale),
                    size.channels,
                    active=DIALECTS[options.dialect].active_outputs,
                )
                for level, number in OUTPUTS.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to the levels (N, C, H / stride, W / stride) by name, H and W padded to multiples of 128.

        Raises:
            ConfigError: in training, batch normalization gets a single value for each channel.
        """
        x = F.pad(x, (0, -x.shape[-1] % _DIVISOR, 0, -x.shape[-2] % _DIVISOR))
        if self.training and self.options.norm == "BN" and x[:, 0].numel() == _DIVISOR**2:
            from dyhead.config_files import ConfigError  # which needs a package that the network does not

            raise ConfigError(
                "MODEL.SPINENET.NORM: expected FrozenBN, or SyncBN on several devices, where a device has one image of "
                f"at most {_DIVISOR} x {_DIVISOR} pixels, got BN, which has no variance of one pixel"
            )
        x = self.stem(x)
        maps = [self.blocks[0](_max_pool(x, 2, DIALECTS[self.options.dialect].same_pools))]
        maps.append(self.blocks[1](maps[0]))
        for number, merge in self.merges.items():
            block = BLOCKS[int(number)]
            merged = [resample(maps[source]) for resample, source in zip(merge, block.inputs, strict=True)]
            merged += [maps[source] for source in block.added]
            maps.append(self.blocks[int(number)](_ACTIVATIONS[self.options.activation](sum(merged))))
        return {
            name: output(maps[number])
            for (name, output), number in zip(self.outputs.items(), OUTPUTS.values(), strict=True)
        }


class ConvNorm(nn.Module):
    """A convolution, batch normalization and, if ``active``, the activation.

    Args:
        options: of the network.
        in_channels: channels of the input.
        channels: of the output.
        kernel: side of the kernel, odd.
        stride: 1 or 2.
        active: see above.
    """

    def __init__(
        self,
        options: SpineNetOptions,
        in_channels: int,
        channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        dialect = DIALECTS[options.dialect]
        same = stride == 2 and dialect.same_convs
        # On even sides SAME pads kernel - 2 in all, the smaller half before.
        self.pad = ((kernel - 2) // 2, (kernel - 1) // 2) * 2 if same else None
        padding = 0 if same else kernel // 2
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = _norm(options.norm, channels, dialect)
        self.activation = _ACTIVATIONS[options.activation] if active else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        x = self.norm(self.conv(x if self.pad is None else F.pad(x, self.pad)))
        return x if self.activation is None else self.activation(x)


class Resampling(nn.Module):
    """A block's map at the level, and with the channels, of another.

    Args:
        options: of the network.
        source: the block.
        target: the other one.
    """

    def __init__(self, options: SpineNetOptions, source: Block, target: Block) -> None:
        super().__init__()
        size = SIZES[options.name]
        width = int(source.width(size.scale) * size.alpha)
        self.octaves = target.level - source.level
        self.dialect = DIALECTS[options.dialect]
        self.squeeze = ConvNorm(options, source.channels(size.scale), width)
        self.down = ConvNorm(options, width, width, 3, stride=2) if self.octaves > 0 else None
        self.expand = ConvNorm(options, width, target.channels(size.scale), active=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of the source to that of the target."""
        x = self.squeeze(x)
        if self.down is not None:
            x, left = self.down(x), self.octaves - 1
            for factor in [2**left] * (left > 0) if self.dialect.pool_once else [2] * left:
                x = _max_pool(x, factor, self.dialect.same_pools)
        elif self.octaves < 0:
            x = F.interpolate(x, scale_factor=float(2**-self.octaves), mode="nearest")
        return self.expand(x)


class ResidualBlock(nn.Module):
    """Three convolutions, or two, around which the input goes.

    Args:
        options: of the network.
        in_channels: channels of the input; the shortcut is convolved if they are not the output's.
        block: what is found of it.
        drop: the probability that in training an image takes the shortcut alone.
    """

    def __init__(self, options: SpineNetOptions, in_channels: int, block: Block, drop: float) -> None:
        super().__init__()
        scale = SIZES[options.name].scale
        width, channels = block.width(scale), block.channels(scale)
        if block.bottleneck:
            self.conv1 = ConvNorm(options, in_channels, width)
            self.conv2 = ConvNorm(options, width, width, 3)
            self.conv3 = ConvNorm(options, width, channels, active=False)
        else:
            self.conv1 = ConvNorm(options, in_channels, width, 3)
            self.conv2 = ConvNorm(options, width, channels, 3, active=False)
            self.conv3 = None
        self.shortcut = ConvNorm(options, in_channels, channels, active=False) if in_channels != channels else None
        self.activation = _ACTIVATIONS[options.activation]
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, C, H, W)."""
        out = self.conv2(self.conv1(x))
        if self.conv3 is not None:
            out = self.conv3(out)
        if self.training and self.drop:
            kept = torch.rand(len(out), 1, 1, 1, device=out.device) >= self.drop
            out = out * kept / (1 - self.drop)
        return self.activation(out + (x if self.shortcut is None else self.shortcut(x)))


def _max_pool(x: Tensor, factor: int, same: bool) -> Tensor:
    """Maxima over ``factor`` + 1 pixels along each side, of every ``factor``-th pixel, or as SAME has it, which pads
    sides that are multiples of ``factor`` by one pixel, after them."""
    if same:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), factor + 1, factor)
    return F.max_pool2d(x, factor + 1, factor, padding=factor // 2)


def _norm(name: str, channels: int, dialect: Dialect) -> nn.Module:
    if name == "FrozenBN":
        from torchvision.ops import FrozenBatchNorm2d  # torchvision is for detectors, not for this module

        return FrozenBatchNorm2d(channels, eps=dialect.eps)
    kind = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}[name]
    return kind(channels, eps=dialect.eps, momentum=dialect.momentum)
