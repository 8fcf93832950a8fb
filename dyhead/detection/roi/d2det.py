"""D2Det (Cao et al., CVPR 2020): boxes from every cell of a region, classes from cells that move and weigh themselves.

Shapes: Q regions of all images, of which P hold an object; C channels, S side of a pooled region in cells, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from dyhead.detection.boxes.losses import log_iou_loss
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi.pooling import level_of, numbered, pool_from
from dyhead.layers.levels import check_integer
from dyhead.ops import deform_roi_pool

_OFFSET_SCALE = 0.1  # of an offset, in the region's width and height
_SAMPLES = 2  # of a cell, per axis


class DiscriminativePool(nn.Module):
    """Discriminative RoI pooling: cells go where the region's content says, and count as theirs does.

    A pooling to a few cells tells the offset of each of S x S parts; deformable pooling to 2S x 2S cells follows them
    (:func:`dyhead.ops.deform_roi_pool`). Each of these cells f has the weight w = exp(12 sigmoid(norm(conv(f)))), and
    the result is the weighted mean of f over windows of 3 x 3 cells, S x S of them.

    Args:
        channels: channels C of the pyramid's levels.
        strides: of the levels, by name.
        side: S.
        fc_dim: features of the two layers that tell the offsets.
        aligned: see :func:`dyhead.ops.deform_roi_pool`; False for weights of the original code.

    Raises:
        ValueError: S below 2.
    """

    def __init__(
        self, channels: int, strides: Mapping[str, int], side: int = 7, fc_dim: int = 1024, aligned: bool = True
    ) -> None:
        super().__init__()
        if side < 2:
            raise ValueError(f"side: expected at least 2 cells, got {side}")
        self.strides = dict(strides)
        self.side = side
        self.aligned = aligned
        widths = [channels * (side // 2) ** 2, fc_dim, fc_dim, 2 * side**2]
        self.offset_layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.weight_conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.weight_norm = nn.GroupNorm(channels, channels)  # instance normalization, which takes no 0 regions
        nn.init.zeros_(self.weight_conv.weight)
        for layer in self.offset_layers[:-1]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.offset_layers[-1].weight)
        nn.init.zeros_(self.offset_layers[-1].bias)

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Levels (N, C, H, W) and boxes of each image in pixels to (Q, C, S, S)."""
        regions = numbered(boxes)
        offset = self.offsets(self._pooled(features, regions, None, self.side // 2))
        cells = self._pooled(features, regions, offset.repeat_interleave(2, 2).repeat_interleave(2, 3), 2 * self.side)
        weight = (12 * self.weight_norm(self.weight_conv(cells)).sigmoid()).exp()
        # Of the cells that windows at the edge lack, both numerator and denominator have 0.
        return _windows(at_least_float32(cells) * weight) / _windows(at_least_float32(weight))

    def offsets(self, cells: Tensor) -> Tensor:
        """Of regions (Q, C, S // 2, S // 2), (Q, 2, S, S): to the right and down, see `deform_roi_pool`."""
        x = cells.flatten(1)
        for layer in self.offset_layers[:-1]:
            x = layer(x).relu()
        return self.offset_layers[-1](x).view(-1, 2, self.side, self.side)

    def _pooled(self, features: Mapping[str, Tensor], regions: Tensor, offset: Tensor | None, side: int) -> Tensor:
        def pool(level: Tensor, own: Tensor, stride: int, here: Tensor) -> Tensor:
            moved = None if offset is None else at_least_float32(offset[here])
            return deform_roi_pool(
                level, own.to(level.dtype) if level.dtype == torch.float64 else own.float(), moved, side, 1 / stride,
                _SAMPLES, _OFFSET_SCALE, aligned=self.aligned,
            )  # fmt: skip

        levels = [features[name] for name in self.strides]
        return pool_from(levels, list(self.strides.values()), regions, level_of(regions, self.strides), side, pool)


class DenseLocalHead(nn.Module):
    """Dense local regression: every cell of a region tells how far the object's sides are, and whether it is in it.

    Args:
        channels: channels C of a region.
        conv_dim: channels of each convolution.
        num_conv: how many there are; the first one has stride 2.
        groups: of GroupNorm.

    Raises:
        ValueError: groups that do not divide the channels.
    """

    def __init__(self, channels: int, conv_dim: int = 576, num_conv: int = 8, groups: int = 36) -> None:
        super().__init__()
        num_conv = check_integer("num_conv", num_conv)
        if conv_dim % groups:
            raise ValueError(f"box_conv_groups: expected a divisor of the {conv_dim} channels, got {groups}")
        widths = [channels, *[conv_dim] * num_conv]
        self.convs = nn.ModuleList(
            nn.Conv2d(*pair, 3, stride=2 if i == 0 else 1, padding=1, bias=False)
            for i, pair in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, conv_dim) for _ in range(num_conv))
        self.sides = nn.Conv2d(conv_dim, 4, 3, padding=1)
        self.inside = nn.Conv2d(conv_dim, 1, 3, padding=1)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for conv in (self.sides, self.inside):
            nn.init.normal_(conv.weight, std=0.001)
            nn.init.zeros_(conv.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (P, C, 2S, 2S) to distances (P, 4, S, S) and logits of being inside (P, S, S), in float32 at least.

        Distances are to the left, right, upper and lower side, in units of the region's width (the first two) and
        height.
        """
        x = regions
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return at_least_float32(self.sides(x)).relu(), at_least_float32(self.inside(x)).squeeze(1)


class CellTargets(NamedTuple):
    """What cells of regions are to predict.

    Attributes:
        distances: (P, 4, S, S) in pixels, in the order of :class:`DenseLocalHead`.
        inside: (P, S, S) bool, whether the cell's center is well inside the object.
    """

    distances: Tensor
    inside: Tensor


def cell_targets(regions: Tensor, objects: Tensor, side: int) -> CellTargets:
    """What the cells of regions (P, 4) are to predict of objects (P, 4): see :class:`CellTargets`.

    A cell is inside if its center is at least a sixth of the region's width and height inside the object.
    """
    x, y, size = _centers(regions, side)
    left, top, right, bottom = (each.view(-1, 1, 1) for each in objects.unbind(1))
    distances = torch.stack(torch.broadcast_tensors(x - left, right - x, y - top, bottom - y), 1)
    return CellTargets(distances, (distances >= size / 6).all(1))


def cell_boxes(regions: Tensor, distances: Tensor) -> Tensor:
    """The box that each cell of regions (P, 4) predicts, (P, S, S, 4), from :class:`DenseLocalHead`'s distances."""
    x, y, size = _centers(regions, distances.shape[-1])
    left, right, top, bottom = (distances * size).unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], -1)


def _centers(regions: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of cells, x (P, 1, S) and y (P, S, 1), and the regions' width, width, height and height (P, 4, 1, 1)."""
    part = (torch.arange(side, dtype=regions.dtype, device=regions.device) + 0.5) / side
    width, height = (regions[:, 2:] - regions[:, :2]).unbind(1)
    x, y = regions[:, :1] + width[:, None] * part, regions[:, 1:2] + height[:, None] * part
    return x[:, None, :], y[:, :, None], torch.stack([width, width, height, height], 1)[..., None, None]


def cell_losses(
    regions: Tensor, objects: Tensor, distances: Tensor, logits: Tensor, as_published: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of boxes, and that of being inside, of the cells of regions.

    The first is the mean of -log IoU over cells that are inside their object, the second the mean binary cross-entropy
    over all. Where there are none it is 0, with a gradient.

    Args:
        regions, objects: (P, 4) in pixels.
        distances, logits: of :class:`DenseLocalHead`.
        as_published: as the original code computes the first: the mean over all cells times the share of those inside,
            of IoUs whose boxes are a pixel wider and higher, to which 0.1 is added up to 0.1.
    """
    targets = cell_targets(regions, objects, logits.shape[-1])
    wanted = targets.inside.to(logits.dtype)
    of_inside = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / max(wanted.numel(), 1)
    boxes = cell_boxes(regions, distances).flatten(0, 2)
    truth = objects[:, None, None].expand(-1, *logits.shape[1:], -1).flatten(0, 2)
    if not as_published:
        # Only those that count: elsewhere the gradient of an empty box may be none.
        chosen = targets.inside.flatten()
        of_boxes = log_iou_loss(boxes[chosen], truth[chosen]).sum() / wanted.sum().clamp(min=1)
        return of_boxes + 0 * distances.sum(), of_inside
    if not targets.inside.any():
        return 0 * boxes.sum(), of_inside
    return published_iou_loss(boxes, truth).mean() * wanted.mean(), of_inside


def published_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """The original code's -log IoU, (P,) from boxes (P, 4): it jumps up to 2.303 where the IoU falls below 0.1."""
    low, high = torch.max(boxes[:, :2], targets[:, :2]), torch.min(boxes[:, 2:], targets[:, 2:])
    overlap = (high - low + 1).clamp(min=0).prod(1)
    areas = [(each[:, 2:] - each[:, :2] + 1).prod(1) for each in (boxes, targets)]
    iou = (overlap / (areas[0] + areas[1] - overlap)).clamp(min=1e-6)
    return -torch.where(iou <= 0.1, iou + 0.1, iou).log()


def average_boxes(regions: Tensor, distances: Tensor, logits: Tensor, as_published: bool = False) -> Tensor:
    """The box of each region (P, 4): the mean of those of the cells that say that they are inside; of all if none does.

    As published, a region without such a cell gets (0, 0, 0, 0), and all boxes shrink towards 0 by 1e-5 over the cells.
    """
    boxes, counts = cell_boxes(regions, distances).flatten(1, 2), (logits > 0).flatten(1)
    if as_published:
        return (boxes * counts.unsqueeze(2)).sum(1) / (counts.sum(1, keepdim=True) + 1e-5)
    counts = counts | ~counts.any(1, keepdim=True)
    return (boxes * counts.unsqueeze(2)).sum(1) / counts.sum(1, keepdim=True)


def jitter(boxes: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (P, 4) whose center and size change by offsets (x, y, width, height) of their size; cut to the image.

    Args:
        boxes: in pixels.
        offsets: (P, 4); 0.1 is a tenth of the box's width or height to the right or down, or as much wider or higher.
        size: height and width of the image, whose last pixels' centers are the farthest that boxes reach.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2 + extent * offsets[:, :2], extent * (1 + offsets[:, 2:]) / 2
    limits = boxes.new_tensor([size[1] - 1, size[0] - 1]).repeat(2)
    return torch.cat([center - half, center + half], 1).clamp(min=0).minimum(limits)


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, least_score: float, most: int
) -> tuple[Tensor, Tensor]:
    """Linear soft-NMS (Bodla et al., ICCV 2017) in each class: which boxes are left, best first, and their scores.

    The best box multiplies the scores of those of its class that it overlaps by more than a threshold by 1 - IoU.

    Args:
        boxes, scores, labels: (D, 4), (D,) and (D,).
        iou_threshold: from which on boxes lose.
        least_score: below it boxes go.
        most: boxes that are left.
    """
    factor = box_iou(boxes, boxes)
    factor = torch.where((factor > iou_threshold) & (labels[:, None] == labels), 1 - factor, 1)
    scores, left = scores.clone(), torch.ones_like(labels, dtype=torch.bool)
    order: list[Tensor] = []
    for _ in range(min(most, len(boxes))):
        best = torch.where(left, scores, -1).argmax()
        left[best] = False
        order.append(best)
        scores = torch.where(left, scores * factor[best], scores)
    chosen = torch.stack(order) if order else labels.new_zeros(0)
    chosen = chosen[scores[chosen] >= least_score]
    return chosen, scores[chosen]


def _windows(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)
