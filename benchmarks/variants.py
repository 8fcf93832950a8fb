"""`python -m benchmarks.variants ...` is train_net.py with more necks, to compare DyHead with.

* `MODEL.NECKS ["DyHeadVariant"]` is DyHead with what was tried in its blocks: `MODEL.DYHEADVARIANT` has the keys of
  `MODEL.DYHEAD` and those below. What wins becomes an option of `dyhead.layers.DyHead`, or its default.
* `MODEL.NECKS ["Convolutions"]` is ordinary convolutions in DyHead's place.

See docs/evidence.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dyhead.layers import DyHead
from dyhead.layers.hard_sigmoid import plain_hard_sigmoid
from dyhead.layers.levels import relative_strides
from dyhead.layers.scale_attention import ScaleAwareAttention
from dyhead.layers.spatial_attention import SpatialAwareAttention, WeightedConv2d
from dyhead.necks import DyHeadOptions, register_neck
from dyhead.ops import pyramid_deform_conv2d
from dyhead.options import above, at_least, one_of, option
from dyhead.runs.command import main


class NormOfBranches(SpatialAwareAttention):
    """Eq. 4 with a GroupNorm for what each level adds to the sum, one for finer levels, the same and coarser ones.

    That is where the published block has its norms. The scale-aware weights come after them.
    """

    def __init__(self, channels: int, *, norm_groups: int = 16, **options) -> None:
        super().__init__(channels, norm=None, **options)
        self.norms = nn.ModuleList(nn.GroupNorm(norm_groups, channels) for _ in range(3))

    def forward(self, levels: list[Tensor], level_weight: Tensor | None = None, norm: bool = True) -> list[Tensor]:
        strides = relative_strides(levels)
        if level_weight is None:
            level_weight = levels[0].new_ones(levels[0].shape[0], len(levels))
        out = []
        for m, level in enumerate(levels):
            first, last = self.window_of(m, len(levels))
            offset, mask = self.offset_and_mask(level, level_weight[:, m])
            parts = []
            for source in range(first, last + 1):
                side = 0 if source < m else 1 if source == m else 2
                scale = [strides[m] / strides[source]]
                kernel = self.weight[side : side + 1]
                part = self.norms[side](
                    pyramid_deform_conv2d([levels[source]], offset, kernel, mask=mask, scales=scale)
                )
                parts.append(part * level_weight[:, source, None, None, None])
            out.append(sum(parts) / len(parts))
        return out


class ScaledOffsets(WeightedConv2d):
    """The convolution of offsets and importances at a learning rate of its own, as far as that is Adam's.

    Its results are those of weights that are smaller, times a factor: Adam's steps do not depend on the size of
    gradients, so that the results move by the factor of what they would.
    """

    def __init__(self, other: WeightedConv2d, factor: float) -> None:
        super().__init__(other.in_channels, other.out_channels, 3, padding=1)
        self.factor = factor
        self.load_state_dict({name: value / factor for name, value in other.state_dict().items()})

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return super().forward(x, weight) * self.factor


class HardScale(ScaleAwareAttention):
    """Eq. 3 with the hard sigmoid's own gradient, which is 0 where weights are 0 or 1."""

    def sigma(self, x: Tensor) -> Tensor:
        return plain_hard_sigmoid(x)


class LeakyScale(HardScale):
    """Eq. 3 with a tenth of the gradient there, wherever it leads."""

    def sigma(self, x: Tensor) -> Tensor:
        leak = 0.1 * (x - x.detach()) / 2
        return super().sigma(x) + leak * (x.abs() > 1)


class RectifiedScale(HardScale):
    """Eq. 3 with a ReLU before the hard sigmoid, as the published block has it: weights from 0.5 on."""

    def sigma(self, x: Tensor) -> Tensor:
        return super().sigma(x.relu())


_SCALES = {"through": ScaleAwareAttention, "hard": HardScale, "leaky": LeakyScale, "relu": RectifiedScale}


class NormOfInputs(nn.Module):
    """A GroupNorm for what comes into the blocks, the same for all levels: those of a pyramid differ in scale."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels)

    def forward(self, pyramid: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, C, H, W) by name to levels of the same shapes."""
        return {name: self.norm(level) for name, level in pyramid.items()}


@register_neck("DyHeadVariant")
@dataclass(frozen=True)
class VariantOptions(DyHeadOptions):
    """DyHead with another initialization or norm, to compare it with."""

    initialization: str = option(
        "identity",
        "of the kernels of Eq. 4: identity, as in DyHead; he: all three by He et al., nothing passes unchanged",
        one_of("identity", "he"),
    )
    norm_place: str = option(
        "sum", "sum: GN after the sum over levels, as in DyHead; branches: before it", one_of("sum", "branches")
    )
    noise: float = option(
        SpatialAwareAttention.INITIAL_NOISE,
        "of kernels that start as the identity, in parts of He et al.'s standard deviation",
        at_least(0),
    )
    offset_factor: float = option(1.0, "of the learning rate of offsets and importances, for Adam", above(0))
    scale: str = option(
        "through",
        "scale-aware weights: through, as in DyHead, with a gradient that leads back from 0 and 1; hard: with the hard"
        " sigmoid's own, 0; leaky: with a tenth of that within; relu: hard, with a ReLU before it",
        one_of(*_SCALES),
    )
    input_norm: bool = option(False, "a GroupNorm before the first block")

    def build(self, channels: int, num_levels: int | None = None) -> DyHead:
        """The module, with random weights."""
        ours = asdict(self)
        scale = _SCALES[ours.pop("scale")]
        initialization, norm_place = ours.pop("initialization"), ours.pop("norm_place")
        noise, offset_factor = ours.pop("noise"), ours.pop("offset_factor")
        input_norm = ours.pop("input_norm")
        if initialization == "he" and noise != SpatialAwareAttention.INITIAL_NOISE:
            raise ValueError(
                f"noise: expected none beside initialization 'he', whose kernels are He et al.'s, got {noise}"
            )
        head = DyHeadOptions(**ours).build(channels, num_levels)
        if input_norm:
            head.adapt_in = NormOfInputs(channels, self.norm_groups)
        for block in head.blocks:
            if norm_place == "branches":
                options = {key: ours[key] for key in ("window", "offset_groups", "norm_groups", "zero_init_offset")}
                block.spatial_attention = NormOfBranches(channels, **options)
                block.merges_norm = False
            if scale is not ScaleAwareAttention:
                state = block.scale_attention.state_dict()
                with torch.random.fork_rng(devices=[]):  # so that all other weights start as without it
                    block.scale_attention = scale(channels)
                block.scale_attention.load_state_dict(state)
            attention = block.spatial_attention
            with torch.no_grad():
                if initialization == "he":
                    for kernel in attention.weight:
                        nn.init.kaiming_normal_(kernel, nonlinearity="relu")
                elif noise != attention.INITIAL_NOISE:
                    identity = nn.init.dirac_(torch.empty_like(attention.weight[1]))
                    attention.weight[1] -= identity
                    attention.weight *= noise / attention.INITIAL_NOISE
                    attention.weight[1] += identity
            if offset_factor != 1:
                attention.offset = ScaledOffsets(attention.offset, offset_factor)
        return head


class Convolutions(nn.Module):
    """3x3 convolutions with GroupNorm and ReLU, the same for all levels: a detector's tower as a neck."""

    def __init__(self, channels: int, depth: int, norm_groups: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(depth)
            for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(norm_groups, channels), nn.ReLU())
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, pyramid: dict[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, C, H, W) by name to levels of the same shapes."""
        return {name: self.layers(level) for name, level in pyramid.items()}


@register_neck("Convolutions")
@dataclass(frozen=True)
class ConvolutionsOptions:
    """A tower in the place of a neck."""

    depth: int = option(3, "3x3 convolutions one after the other", at_least(1))
    norm_groups: int = option(16, "groups of their GroupNorm", at_least(1))

    def build(self, channels: int, num_levels: int | None = None) -> Convolutions:
        """The module, with random weights."""
        return Convolutions(channels, self.depth, self.norm_groups)

    def size_divisibility(self, strides: Sequence[int]) -> int:
        """What it asks of the image's height and width, in pixels: nothing."""
        return 1


if __name__ == "__main__":
    sys.exit(main())
