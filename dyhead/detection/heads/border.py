"""The head of BorderDet (Qiu et al., "BorderDet: Border Feature for Dense Object Detection", ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyhead.detection.heads.dense import DenseHead, at_least_float32, convolution, start_at
from dyhead.ops import border_align

BORDER_NORMS = ("IN", "")


class BorderHead(DenseHead):
    """Class logits, coarse boxes and a quality logit at every cell, and what is seen at the four sides of its box.

    The first three are those of :class:`DenseHead`. Two border modules, one for each tower, read the tower at the cell
    and, by ``dyhead.ops.border_align``, at points along the sides of the coarse box, cut to the map and without a
    gradient. From them 1x1 convolutions predict class logits again, and how the coarse box is to be refined.

    The first box numbers are distances to the sides in strides, as of :class:`dyhead.detection.boxes.Distances`, from
    the point of the cell, which is where the cell's pixel lies on the map.

    Args:
        channels: channels C of every level.
        num_classes: classes K, without background.
        class_channels, box_channels: channels of each side in the border module of the classes and of the boxes.
        pool_size: parts that a side is divided into, from 1 to 255; its features are the largest at the points
            between them and at its ends.
        border_norm: "IN": what is read is first normalized over the level of its image, without learned factors. On a
            level of a single pixel, where the norm's variance is 0, what is read is then 0. "": it is not.
        num_levels, num_convs, norm, norm_groups, kernel_size, quality, delta_scale, prior_prob: as for
            :class:`DenseHead`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> head = BorderHead(64, num_classes=3, quality="box")
        >>> logits, boxes, quality, border_logits = head([torch.randn(2, 64, 8, 8)])
        >>> tuple(boxes[0].shape), tuple(border_logits[0].shape)
        ((2, 8, 8, 8), (2, 3, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        class_channels: int = 256,
        box_channels: int = 128,
        pool_size: int = 10,
        border_norm: str = "IN",
        num_levels: int = 1,
        num_convs: int = 0,
        norm: str = "",
        norm_groups: int = 32,
        kernel_size: int = 3,
        quality: str | None = None,
        delta_scale: bool = False,
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__(
            channels,
            num_classes,
            num_levels=num_levels,
            num_convs=num_convs,
            norm=norm,
            norm_groups=norm_groups,
            kernel_size=kernel_size,
            quality=quality,
            delta_scale=delta_scale,
            prior_prob=prior_prob,
        )
        if border_norm not in BORDER_NORMS:
            raise ValueError(f"border_norm: expected one of {', '.join(map(repr, BORDER_NORMS))}, got {border_norm!r}")
        if not 1 <= pool_size <= 255:
            raise ValueError(f"pool_size: expected 1 to 255, got {pool_size}")
        for name, value in (("class_channels", class_channels), ("box_channels", box_channels)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.class_border = _BorderModule(channels, class_channels, pool_size, border_norm)
        self.box_border = _BorderModule(channels, box_channels, pool_size, border_norm)
        self.border_logits = convolution(channels, num_classes, 1)
        self.border_deltas = convolution(channels, 4, 1)
        start_at(self.border_logits, prior_prob)

    def forward(
        self, levels: Sequence[Tensor | tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor]]:
        """Predictions of each level (N, C, H, W), or pair of such, in float32 at least.

        Returns:
            Class logits (N, K, H, W); raw box numbers (N, 8, H, W), four of the coarse box and four that refine it;
            quality logits (N, 1, H, W), or None; the border's class logits (N, K, H, W): each a list over levels.

        Raises:
            ValueError: not ``num_levels`` levels, where they differ in a factor or a norm.
        """
        self.check(levels)
        logits, boxes, quality, refined = [], [], [], []
        for i, level in enumerate(levels):
            of_class, of_box = self.towers(level, i)
            of_level, numbers, quality_of_level = self.predict(of_class, of_box, i)
            where = coarse_boxes(numbers)
            shifts = at_least_float32(self.border_deltas(self.box_border(of_box, where)))
            logits.append(of_level)
            boxes.append(torch.cat([numbers, shifts], dim=1))
            quality.append(quality_of_level)
            refined.append(at_least_float32(self.border_logits(self.class_border(of_class, where))))
        return logits, boxes, quality if self.quality is not None else None, refined


@torch.no_grad()
def coarse_boxes(numbers: Tensor) -> Tensor:
    """Where a level is read for each cell: its coarse box, cut to the map, (N, 4, H, W) as x0, y0, x1, y1, in pixels.

    Args:
        numbers: distances to the left, upper, right and lower side in strides, (N, 4, H, W); negative ones count as 0.
    """
    height, width = numbers.shape[-2:]
    y, x = (torch.arange(n, dtype=numbers.dtype, device=numbers.device) for n in (height, width))
    y = y[:, None]
    left, top, right, bottom = numbers.relu().unbind(dim=1)
    # By tensors: numbers would be constants of a traced detector.
    columns = [ends.clamp(min=0).minimum(x[-1]) for ends in (x - left, x + right)]
    rows = [ends.clamp(min=0).minimum(y[-1]) for ends in (y - top, y + bottom)]
    return torch.stack([columns[0], rows[0], columns[1], rows[1]], dim=1)


class _BorderModule(nn.Module):
    """What a level says of each cell and of the sides of a box, (N, C, H, W) from the same and boxes (N, 4, H, W)."""

    def __init__(self, channels: int, width: int, pool_size: int, norm: str) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.norm = norm
        self.point = convolution(channels, width, 1)
        self.sides = convolution(channels, 4 * width, 1)
        self.out = convolution(5 * width, channels, 1)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        point, sides = (self._normalized(convolution(x)).relu() for convolution in (self.point, self.sides))
        aligned = border_align(sides, boxes, self.pool_size)
        return self.out(torch.cat([aligned, point], dim=1)).relu()

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.norm:
            return x
        if torch.jit.is_tracing():  # maps of other sizes are to come; this takes those of one pixel, too
            return torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled)
        if x.shape[-2:] == (
            1,
            1,
        ):  # torch.nn.functional refuses to normalize one pixel, which differs from its mean by 0
            return x - x.mean(dim=(2, 3), keepdim=True)
        return F.instance_norm(x)
