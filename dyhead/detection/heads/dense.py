"""The head of one-stage detectors: predictors on every level, with or without convolutions of their own before them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORMS = ("", "GN", "BN", "SyncBN")


class DenseHead(nn.Module):
    """Class logits, box numbers and a quality logit at every cell of every level.

    After DyHead the predictors sit directly on the unified branch (Fig. 2b of the paper: ``num_convs`` 0). Classic
    detectors have two towers of ``num_convs`` 3x3 convolutions with ReLU before them, one for the classes and one for
    the boxes (RetinaNet, Lin et al., ICCV 2017). All convolutions are shared by the levels. They start with normal
    weights of standard deviation 0.01; the classes' bias makes every class start at probability ``prior_prob``.

    A level may be a pair, as some necks put out: what classes are predicted from and what boxes are.

    Args:
        channels: channels C of every level.
        num_classes: classes K, without background.
        num_anchors: anchors A per cell; 1 for anchor-free detectors.
        num_levels: levels L.
        num_convs: convolutions of each tower.
        norm: after each of them: "" none, "GN" of ``norm_groups`` groups, "BN" or "SyncBN", one for each level.
        norm_groups: groups of "GN".
        kernel_size: size of the predictors, odd.
        quality: predict one quality logit per anchor from the tower of the "box" or the "class"; None: none.
        delta_scale: give the box numbers of each level a learned factor of its own, starting at 1.
        prior_prob: initial probability of every class, in (0, 1).
        box_numbers: numbers per anchor that describe a box.
        predictor_channels: channels that the predictors read, where a head puts something between towers and
            predictors; None: those of the levels.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> head = DenseHead(64, num_classes=3, quality="box")
        >>> logits, boxes, quality = head([torch.randn(2, 64, 8, 8)])
        >>> tuple(logits[0].shape), tuple(boxes[0].shape), tuple(quality[0].shape)
        ((2, 3, 8, 8), (2, 4, 8, 8), (2, 1, 8, 8))
    """

    #: Whether levels may be pairs; not so in a head without this.
    takes_task_levels = True

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_anchors: int = 1,
        *,
        num_levels: int = 1,
        num_convs: int = 0,
        norm: str = "",
        norm_groups: int = 32,
        kernel_size: int = 3,
        quality: str | None = None,
        delta_scale: bool = False,
        prior_prob: float = 0.01,
        box_numbers: int = 4,
        predictor_channels: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("channels", channels, 1),
            ("num_classes", num_classes, 1),
            ("num_anchors", num_anchors, 1),
            ("num_levels", num_levels, 1),
            ("num_convs", num_convs, 0),
            ("box_numbers", box_numbers, 1),
            ("predictor_channels", channels if predictor_channels is None else predictor_channels, 1),
        ):
            if value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob: expected a probability between 0 and 1, got {prior_prob}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        if norm == "GN" and num_convs and channels % norm_groups:
            raise ValueError(f"norm_groups: expected a divisor of the {channels} channels, got {norm_groups}")
        if quality not in (None, "box", "class"):
            raise ValueError(f"quality: expected 'box', 'class' or None, got {quality!r}")

        def tower() -> nn.ModuleList:
            return nn.ModuleList(_ConvNorm(channels, norm, norm_groups, num_levels) for _ in range(num_convs))

        def predictor(out_channels: int) -> nn.Conv2d:
            return convolution(predictor_channels or channels, out_channels, kernel_size)

        self.num_classes = num_classes
        self.num_anchors = num_anchors
        self.num_levels = num_levels
        self.quality_from = quality
        self.class_tower, self.box_tower = tower(), tower()
        self.logits = predictor(num_anchors * num_classes)
        self.deltas = predictor(num_anchors * box_numbers)
        self.quality = predictor(num_anchors) if quality else None
        self.delta_scale = nn.Parameter(torch.ones(num_levels)) if delta_scale else None
        start_at(self.logits, prior_prob)

    def forward(
        self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """Predictions of each level (N, C, H, W), or pair of such, in float32 at least.

        So decoding and losses are exact under autocast.

        Returns:
            Class logits (N, A*K, H, W), anchor by anchor; raw box numbers (N, A*X, H, W), X being ``box_numbers``;
            quality logits (N, A, H, W), or None: each a list over levels.

        Raises:
            ValueError: not ``num_levels`` levels, where they differ in a factor or a norm.
        """
        self.check(levels)
        logits, boxes, quality = [], [], []
        for i, level in enumerate(levels):
            predicted = self.predict(*self.towers(level, i), i)
            for levels_of, values in zip((logits, boxes, quality), predicted, strict=True):
                levels_of.append(values)
        return logits, boxes, quality if self.quality is not None else None

    def check(self, levels: Sequence[Tensor]) -> None:
        """Raises ValueError if there are not ``num_levels`` levels, where they differ in a factor or a norm."""
        if len(levels) != self.num_levels and self.num_levels > 1:
            raise ValueError(f"levels: expected {self.num_levels}, got {len(levels)}")

    def towers(self, level: Tensor | tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
        """What the two towers, of the classes and of the boxes, make of the ``i``-th level (N, C, H, W), or pair."""
        of_class, of_box = level if isinstance(level, tuple) else (level, level)
        for layer in self.class_tower:
            of_class = layer(of_class, i)
        for layer in self.box_tower:
            of_box = layer(of_box, i)
        return of_class, of_box

    def predict(self, of_class: Tensor, of_box: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class logits, raw box numbers and quality logits, if any, from what the towers make of the ``i``-th level."""
        numbers = self.deltas(of_box)
        if self.delta_scale is not None:
            numbers = numbers * self.delta_scale[i]
        quality = None
        if self.quality is not None:
            quality = at_least_float32(self.quality(of_box if self.quality_from == "box" else of_class))
        return at_least_float32(self.logits(of_class)), at_least_float32(numbers), quality


class _ConvNorm(nn.Module):
    """A 3x3 convolution, the level's norm, and ReLU."""

    def __init__(self, channels: int, norm: str, groups: int, levels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels, 3)
        self.norm: nn.Module | None = None
        if norm == "GN":
            self.norm = nn.GroupNorm(groups, channels)
        elif norm:
            kind = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
            self.norm = nn.ModuleList(kind(channels) for _ in range(levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.ModuleList):  # levels have statistics of their own
            x = self.norm[level](x)
        elif self.norm is not None:
            x = self.norm(x)
        return x.relu()


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution that keeps height and width and starts as all of a head's do."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def start_at(predictor: nn.Conv2d, probability: float) -> None:
    """Makes the predictor of logits say this probability of everything at the start of training."""
    nn.init.constant_(predictor.bias, -math.log((1 - probability) / probability))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, all else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
