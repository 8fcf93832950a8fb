"""The criterion of SaccadeNet (Lan et al., "SaccadeNet: A Fast and Accurate Object Detector", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dyhead.detection.normalizer import divisor_of
from dyhead.options import at_least, inside, option

if TYPE_CHECKING:
    from dyhead.detection.detector import DenseDetector, Predictions, Targets

_CORNERS = 4


class CenterTruth(NamedTuple):
    """What the predictions of one image are to be; R places of one level, M objects.

    Attributes:
        classes: (R, K), a heatmap for each class: 1 in the cell of an object's center, less around it.
        corners: (R, 4), likewise of objects' upper left, upper right, lower left and lower right corners.
        places: (M,), of the objects' centers.
        boxes: (M, 4), of the objects.
    """

    classes: Tensor
    corners: Tensor
    places: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class CenterCriterion:
    r"""The cell of an object's center has its class and its box; the heatmaps of classes and corners are Gaussian.

    Around a center or corner, the heatmap is :math:`\exp(-d^2 / (2 \sigma^2))` of the distance d in cells, up to r
    cells in x and y, with :math:`\sigma = (2 r + 1) / 6`; of several objects the largest counts. For an object of
    w x h cells, each rounded up, and the overlap o, r is :math:`\sqrt{o^2 (w + h)^2 + 4 o (1 - o) w h} - o (w + h)`,
    rounded down: what CenterNet's code computes, whose least radius of three this always is, not what CornerNet
    derives.

    The losses of the heatmaps are divided by their cells that are 1, those of the corners also by 4; absolute errors at
    centers are averaged over two numbers and over objects. Cells and objects are averaged over devices, and at least 1.
    """

    center_loss_weight: float = option(1.0, "what the loss of the centers is multiplied by", at_least(0))
    size_loss_weight: float = option(0.1, "what the loss of the first sizes is multiplied by", at_least(0))
    refined_size_loss_weight: float = option(0.1, "what the loss of the refined sizes is multiplied by", at_least(0))
    refined_center_loss_weight: float = option(
        1.0,
        "what the loss of the refined centers is multiplied by; the published code trains them by no loss, and counts "
        "the centers' twice",
        at_least(0),
    )
    corner_loss_weight: float = option(4.0, "what the loss of the corners is multiplied by", at_least(0))
    heatmap_overlap: float = option(0.7, "of which overlap the radius of the heatmaps is; o in it", inside(0, 1))
    corners_in_one_map: bool = option(
        False, "all corners are in the first of the four heatmaps, as the published code has it by a mistake"
    )
    clip_targets: bool = option(
        False,
        "objects are cut one cell before the level's right and lower end, as in the published code, where padding "
        "is part of the image",
    )

    def __call__(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See :mod:`dyhead.detection.criteria`.

        The losses are those of the classes, the corners, the centers, the sizes, the refined sizes and, if there are
        any, the refined centers. The box form is :class:`~dyhead.detection.boxes.Centers`, the class loss one of
        targets from 0 to 1, and the level one.

        Raises:
            ValueError: predictions of a head in evaluation mode, which leaves out corners.
        """
        form = detector.box_form
        numbers, corners = predictions.boxes[..., : form.per_place], predictions.boxes[..., form.per_place :]
        if corners.shape[-1] != _CORNERS:
            raise ValueError(
                "losses: expected the predictions of a detector in training mode, got some without corners"
            )
        truths = [self.truth(detector, predictions, target) for target in targets]
        classes = torch.stack([truth.classes for truth in truths])
        of_corners = torch.stack([truth.corners for truth in truths])
        places = [truth.places for truth in truths]
        image = torch.cat([torch.full_like(own, i) for i, own in enumerate(places)])
        place, boxes = torch.cat(places), torch.cat([truth.boxes for truth in truths])
        counts = torch.stack([(classes == 1).sum(), (of_corners == 1).sum(), boxes.new_tensor(len(boxes))])
        cells, corner_cells, objects = divisor_of(counts.to(numbers.dtype), 1)

        anchors = detector.places(predictions).anchors
        errors = form.costs(numbers[image, place], anchors[place], boxes).sum(dim=0) / objects
        weights = (
            self.center_loss_weight,
            self.size_loss_weight,
            self.refined_size_loss_weight,
            self.refined_center_loss_weight,
        )
        losses = (
            detector.class_loss(predictions.logits, classes) / cells,
            self.corner_loss_weight * detector.class_loss(corners, of_corners) / (_CORNERS * corner_cells),
            *(weight * error for weight, error in zip(weights, errors, strict=False)),
        )
        return dict(zip(detector.loss_names, losses, strict=True))

    @torch.no_grad()
    def truth(self, detector: DenseDetector, predictions: Predictions, target: Targets) -> CenterTruth:
        """What is to be predicted for one image, in the predictions' precision."""
        (stride,) = detector.anchors.strides
        ((height, width),) = predictions.shapes
        boxes, labels = target.boxes.to(predictions.boxes.dtype) / stride, target.labels
        last = boxes.new_tensor([width - 1, height - 1])
        if self.clip_targets:
            boxes = boxes.clamp(min=0).minimum(last.repeat(2))
            there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, labels = boxes[there], labels[there]
        radius = self.radius(boxes[:, 2:] - boxes[:, :2])
        center = _cell((boxes[:, :2] + boxes[:, 2:]) / 2, last)
        corner = _cell(boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].view(-1, 2), last)
        which = torch.arange(_CORNERS, device=labels.device).repeat(len(boxes))
        if self.corners_in_one_map:
            which = torch.zeros_like(which)
        shape = (height, width)
        return CenterTruth(
            _heatmap(center, radius, labels, shape, predictions.logits.shape[-1]).to(boxes.dtype),
            _heatmap(corner, radius.repeat_interleave(_CORNERS), which, shape, _CORNERS).to(boxes.dtype),
            center[:, 1] * width + center[:, 0],
            boxes * stride,
        )

    def radius(self, size: Tensor) -> Tensor:
        """The heatmaps' radius in cells, (M,), of objects (M, 2) in cells."""
        width, height = size.ceil().unbind(dim=1)
        around, overlap = width + height, self.heatmap_overlap
        root = (overlap**2 * around**2 + 4 * overlap * (1 - overlap) * width * height).sqrt()
        return (root - overlap * around).long().clamp(min=0)


def _cell(points: Tensor, last: Tensor) -> Tensor:
    """The cells (P, 2) as x, y that points in cells lie in, or the nearest ones."""
    return points.clamp(min=0).minimum(last).long()


def _heatmap(cells: Tensor, radius: Tensor, channel: Tensor, shape: tuple[int, int], channels: int) -> Tensor:
    """The largest of Gaussians at each place, (H*W, channels): of cells (P, 2), radius (P,) and channel (P,) each."""
    height, width = shape
    side = 2 * radius + 1
    area = side**2
    # One entry for each cell of each square.
    of = torch.arange(len(cells), device=cells.device).repeat_interleave(area)
    entry = torch.arange(len(of), device=cells.device) - (area.cumsum(0) - area)[of]
    down, right = entry // side[of] - radius[of], entry % side[of] - radius[of]
    x, y = cells[of, 0] + right, cells[of, 1] + down
    there = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    value = (-(down**2 + right**2) / (2 * (side[of] / 6) ** 2)).exp()
    index = (y * width + x) * channels + channel[of]
    heat = value.new_zeros(height * width * channels).scatter_reduce(0, index[there], value[there], "amax")
    return heat.view(height * width, channels)
