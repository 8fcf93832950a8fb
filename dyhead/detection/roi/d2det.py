"""D2Det (Cao et al., CVPR 2020): boxes from every cell of a region, classes from cells that move and weigh themselves.

Shapes: Q regions of all images, of which P hold an object; C channels, S side of a pooled region in cells, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from dyhead.detection.boxes.losses import log_iou_loss
from dyhead.detection.detector import Detections
from dyhead.detection.heads.dense import at_least_float32
from dyhead.detection.roi.pooling import PyramidPool, level_of, numbered, pool_from
from dyhead.detection.roi.registry import register_box_head
from dyhead.layers.levels import check_integer
from dyhead.ops import deform_roi_pool
from dyhead.options import above, at_least, below, between, option

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
        # In float32: float16 ends below exp(12).
        weight = (12 * at_least_float32(self.weight_norm(self.weight_conv(cells))).sigmoid()).exp()
        # Of the cells that windows at the edge lack, both numerator and denominator have 0.
        return _windows(at_least_float32(cells) * weight) / _windows(weight)

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
        # Each cell starts with a box of the region's size. One of no size, as in the original code, overlaps nothing
        # and has no gradient without the pixel that is added there.
        nn.init.constant_(self.sides.bias, 0.5)

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


@torch.jit.script_if_tracing  # a trace would have as many steps as there were boxes
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


class D2DetHead(nn.Module):
    """D2Det's two branches, with their losses and detections: engines only sample regions.

    Classes are predicted by fully connected layers on :class:`DiscriminativePool`, boxes by :class:`DenseLocalHead` on
    RoIAlign of 2S x 2S cells, the same for all classes. Labels are 0 to K - 1, and K for the background.

    Args:
        channels: channels C of the pyramid's levels.
        side: S.
        strides: of the levels, by name, fine to coarse.
        num_classes: K.
        options: the rest.
        sampling_ratio, aligned: of RoIAlign, see :class:`PyramidPool`.
        score_thresh, nms_thresh: which regions boxes are predicted of: scores above, and IoU of NMS.
        detections_per_image: at most.

    Raises:
        ValueError: options that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        strides: Mapping[str, int],
        num_classes: int,
        options: D2DetOptions,
        *,
        sampling_ratio: int,
        aligned: bool,
        score_thresh: float,
        nms_thresh: float,
        detections_per_image: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_weights = (options.class_loss_weight, options.box_loss_weight, options.inside_loss_weight)
        self.jitter, self.most_trained = options.jitter, options.regions_train
        self.most_tested, self.soft_nms = options.regions_test, (options.soft_nms_thresh, options.soft_nms_least_score)
        self.as_published = options.as_published
        self.score_thresh, self.nms_thresh, self.detections_per_image = score_thresh, nms_thresh, detections_per_image
        self.class_pool = DiscriminativePool(channels, strides, side, options.offset_dim, not options.as_published)
        self.box_pool = PyramidPool(strides, 2 * side, sampling_ratio, aligned)
        widths = [channels * side**2, *[options.fc_dim] * options.num_fc]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.cls_score = nn.Linear(options.fc_dim, num_classes + 1)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)
        self.local = DenseLocalHead(channels, options.box_conv_dim, options.num_box_conv, options.box_conv_groups)

    def class_logits(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Levels (N, C, H, W) and boxes of each image in pixels to (Q, K + 1), the background last."""
        x = self.class_pool(features, boxes).flatten(1)
        for layer in self.fcs:
            x = layer(x).relu()
        return at_least_float32(self.cls_score(x))

    def losses(
        self,
        features: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        objects: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Losses by name: of classes, of boxes, and of cells' being inside.

        Args:
            features: levels (N, C, H, W).
            boxes, labels, objects: the regions of each image, (Q, 4), their labels (Q,), and the object of each (Q, 4),
                which is not read where the label is the background.
            sizes: height and width of each image.
        """
        logits, wanted = self.class_logits(features, boxes), torch.cat(list(labels))
        chosen = self._choose(wanted < self.num_classes).split([len(own) for own in boxes])
        regions = [self._jittered(own[here], size) for own, here, size in zip(boxes, chosen, sizes, strict=True)]
        truth = torch.cat([own[here] for own, here in zip(objects, chosen, strict=True)])
        distances, inside = self.local(self.box_pool(features, regions))
        of_boxes, of_inside = cell_losses(torch.cat(regions), truth, distances, inside, self.as_published)
        # Summed and divided, not averaged: the mean of no regions would be NaN.
        of_classes = F.cross_entropy(logits, wanted, reduction="sum") / max(len(wanted), 1)
        losses = {"loss_cls": of_classes, "loss_box_reg": of_boxes, "loss_box_inside": of_inside}
        return {name: weight * losses[name] for name, weight in zip(losses, self.loss_weights, strict=True)}

    @torch.no_grad()
    def detect(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """What is found in each image: boxes are predicted of the regions that are left after NMS of their classes."""
        scores = self.class_logits(features, boxes).softmax(1)[:, :-1].split([own.shape[0] for own in boxes])
        kept = []
        for own, probabilities in zip(boxes, scores, strict=True):
            place, label = torch.nonzero(probabilities > self.score_thresh, as_tuple=True)
            score = probabilities[place, label]
            best = batched_nms(own[place], score, label, self.nms_thresh)[: self.most_tested]
            kept.append((own[place[best]], score[best], label[best]))
        regions = [own for own, _, _ in kept]
        predicted = average_boxes(
            torch.cat(regions), *self.local(self.box_pool(features, regions)), as_published=self.as_published
        )
        found = []
        for own, (_, score, label), size in zip(
            predicted.split([r.shape[0] for r in regions]), kept, sizes, strict=True
        ):
            own = clip_boxes_to_image(own, size)
            there = (own[:, 2:] > own[:, :2]).all(1)
            own, score, label = own[there], score[there], label[there]
            best, score = soft_nms(own, score, label, *self.soft_nms, self.detections_per_image)
            found.append(Detections(own[best], score, label[best]))
        return found

    def _choose(self, positive: Tensor) -> Tensor:
        """As many of what is positive (Q,), at random, as boxes are learnt from."""
        index = torch.where(positive)[0]
        if len(index) <= self.most_trained:
            return positive
        chosen = index[torch.randperm(len(index), device=index.device)[: self.most_trained]]
        return torch.zeros_like(positive).index_fill(0, chosen, True)

    def _jittered(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        if self.jitter == 0:
            return boxes
        return jitter(boxes, (2 * torch.rand_like(boxes) - 1) * self.jitter, size)


#: A feature pyramid's.
_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


@register_box_head("D2Det", "MODEL.D2DET", detects=True)
@dataclass(frozen=True)
class D2DetOptions:
    """D2Det, with ``MODEL.ROI_BOX_HEAD.NAME D2Det``; the defaults are the authors'.

    See :class:`dyhead.detection.roi.d2det.D2DetHead`. Boxes are the same for all classes and no deltas: of
    ``MODEL.ROI_BOX_HEAD`` it reads alone how regions are pooled. Classes are predicted from ``POOLER_RESOLUTION`` cells
    a side, boxes from twice as many, of the regions that ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` and ``NMS_THRESH_TEST``
    leave.
    """

    num_fc: int = option(2, "layers that predict classes", at_least(1))
    fc_dim: int = option(1024, "features of each of them", at_least(1))
    offset_dim: int = option(1024, "features of the two layers that predict where cells move", at_least(1))
    num_box_conv: int = option(8, "convolutions that predict boxes", at_least(1))
    box_conv_dim: int = option(576, "channels of each of them", at_least(1))
    box_conv_groups: int = option(36, "groups of their GroupNorm; it divides BOX_CONV_DIM", at_least(1))
    class_loss_weight: float = option(2.0, "of the classes", at_least(0))
    box_loss_weight: float = option(2.0, "of the boxes", at_least(0))
    inside_loss_weight: float = option(1.0, "of whether cells are inside the object", at_least(0))
    jitter: float = option(
        0.15,
        "regions that boxes are learnt from move and change their size by up to so much of it, at random",
        at_least(0) & below(1),
    )
    regions_train: int = option(192, "regions that boxes are learnt from, of all images of a device", at_least(1))
    regions_test: int = option(125, "regions of an image that boxes are predicted of", at_least(1))
    soft_nms_thresh: float = option(0.5, "IoU from which on soft-NMS lowers a box's score", between(0, 1))
    soft_nms_least_score: float = option(0.001, "boxes of a lower score are dropped by it", above(0))
    as_published: bool = option(
        False,
        "as the authors' code computes, for their weights: pooled by rounded corners; a box loss of all cells times "
        "the share of those inside; no box of a region whose cells all say that they are outside",
    )

    def build(
        self,
        channels: int,
        side: int,
        strides: Mapping[str, int] = _STRIDES,
        num_classes: int = 80,
        *,
        sampling_ratio: int = 2,
        aligned: bool = True,
        score_thresh: float = 0.03,
        nms_thresh: float = 0.5,
        detections_per_image: int = 100,
    ) -> D2DetHead:
        """The module with random weights, see :class:`D2DetHead`.

        Raises:
            ValueError: options that do not fit the channels or each other.
        """
        return D2DetHead(
            channels, side, strides, num_classes, self, sampling_ratio=sampling_ratio, aligned=aligned,
            score_thresh=score_thresh, nms_thresh=nms_thresh, detections_per_image=detections_per_image,
        )  # fmt: skip
