"""The dense detector: what all of them do with their parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from dyhead.detection.anchors import Anchors, Places
from dyhead.detection.criteria import standard
from dyhead.detection.normalizer import LossNormalizer
from dyhead.detection.scores import Score
from dyhead.options import above, at_least, option

_log = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """What the head says of all places of N images; at least float32.

    Attributes:
        logits: (N, R, K).
        boxes: raw box numbers (N, R, X), as many as the box form has a place.
        quality: logits (N, R), or None.
        shapes: (height, width) of every level in its own pixels.
        refined_logits: (N, R, K) of a second stage, which sees what the first one found; None where there is none.
        levels: (N, C, H, W) by name, which a second stage on regions pools from; None where there is none.
    """

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None
    shapes: list[tuple[int, int]]
    refined_logits: Tensor | None = None
    levels: Mapping[str, Tensor] | None = None

    @property
    def values(self) -> list[Tensor]:
        """All that the head said: (N, R, X) or (N, R) each."""
        return [part for part in (self.logits, self.boxes, self.quality, self.refined_logits) if part is not None]


class Targets(NamedTuple):
    """The objects of one image. Crowd regions are not among them.

    Attributes:
        boxes: (M, 4).
        labels: (M,), 0 to K - 1.
        visible: boxes (M, 4) of the parts that nothing hides, for a detector that reads them; None: ``boxes``.
    """

    boxes: Tensor
    labels: Tensor
    visible: Tensor | None = None


class Detections(NamedTuple):
    """What was found in one image, best first.

    Attributes:
        boxes: (D, 4), inside the image.
        scores: (D,).
        labels: (D,).
        visible_boxes: (D, 4) likewise, of the visible parts, where the detector predicts them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    visible_boxes: Tensor | None = None


class BoxForm(Protocol):
    """See :mod:`dyhead.detection.boxes`."""

    def decode(self, numbers: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (P, 4)."""

    def loss(self, numbers: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """What predictions cost, (P,)."""


class Criterion(Protocol):
    """See :mod:`dyhead.detection.criteria`."""

    def __call__(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Scalars by name."""


@dataclass(frozen=True)
class BoxLoss:
    """How the box losses of positive places become one number."""

    weight: float = option(1.0, "what the box loss is multiplied by", at_least(0))
    by_centerness: bool = option(
        False, "weigh each place's box loss by its centerness and divide by the sum of these, not by the positives"
    )
    smallest_sum: float = option(1e-6, "what that sum is at least", above(0))


@dataclass(frozen=True)
class Inference:
    """How predictions become detections.

    Attributes:
        score_thresh: what is not above it is dropped.
        topk: so many best of every level go on.
        nms_thresh: of two boxes of a class with a larger IoU, the one of the lower score is dropped; 1: no NMS.
        limit: detections of an image.
        clip_before_nms: cut boxes to the image before NMS, not after the limit. Boxes that are then empty are dropped.
        peak_kernel: what is not the largest in a square of so many cells, an odd number, around its own is dropped, for
            each anchor and class alone; what is as large as the largest stays. 1: nothing is.
    """

    score_thresh: float = 0.05
    topk: int = 1000
    nms_thresh: float = 0.6
    limit: int = 100
    clip_before_nms: bool = False
    peak_kernel: int = 1


class DenseDetector(nn.Module):
    """A one-stage detector behind its pyramid, of exchangeable parts.

    Args:
        head: see :class:`dyhead.detection.DenseHead`; one of two stages returns its refined class logits after these.
        in_features: names of the levels, fine to coarse.
        anchors: at every cell.
        box_form: what the head's box numbers mean.
        assigner: which place is which object's; None where the criterion weighs places instead.
        class_loss: from logits and targets; see :mod:`dyhead.detection.losses`. None where the criterion has its own.
        score: at test time.
        normalizer: what losses are divided by; None where the criterion counts itself.
        box_loss: how the box losses are summed up.
        inference: how predictions become detections.
        loss_names: of the losses, in the criterion's order; the standard one has the class, box and quality loss.
        criterion: what predictions cost.

    Raises:
        ValueError: a score or box losses that need a quality, but a head that predicts none.

    Example:
        >>> import torch
        >>> from dyhead.detection import DETECTORS, Targets
        >>> fcos = DETECTORS["DyHeadFCOS"].options(num_classes=3, in_features=("p3", "p4"))
        >>> detector = fcos.build(channels=64, strides=[8, 16])
        >>> predictions = detector({"p3": torch.randn(1, 64, 8, 8), "p4": torch.randn(1, 64, 4, 4)})
        >>> objects = Targets(torch.tensor([[4.0, 4.0, 40.0, 40.0]]), torch.tensor([2]))
        >>> sorted(detector.losses(predictions, [objects]))
        ['loss_fcos_cls', 'loss_fcos_ctr', 'loss_fcos_loc']
        >>> detections = detector.detections(predictions, [(64, 64)])
    """

    def __init__(
        self,
        head: nn.Module,
        in_features: Sequence[str],
        anchors: Anchors,
        box_form: BoxForm,
        assigner: Callable[[Places, Tensor], Tensor] | None,
        class_loss: Callable[[Tensor, Tensor], Tensor] | None,
        score: Score,
        normalizer: LossNormalizer | None,
        *,
        box_loss: BoxLoss = BoxLoss(),
        inference: Inference = Inference(),
        loss_names: tuple[str, ...] = ("loss_cls", "loss_box_reg", "loss_quality"),
        criterion: Criterion = standard,
    ) -> None:
        super().__init__()
        if score.score != "class" and head.quality is None:
            raise ValueError(f"SCORE {score.score}: the detector predicts no quality")
        if box_loss.by_centerness and head.quality is None:
            raise ValueError("BBOX_REG_LOSS_BY_CENTERNESS True: the detector predicts no quality")
        self.head = head
        self.in_features = tuple(in_features)
        self.anchors = anchors
        self.box_form = box_form
        self.assigner = assigner
        self.class_loss = class_loss
        self.score = score
        self.loss_normalizer = normalizer
        self.box_loss = box_loss
        self.inference = inference
        self.loss_names = loss_names
        self.criterion = criterion
        self._nan_told = False

    def forward(self, pyramid: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> Predictions:
        """What the head says, from levels (N, C, H, W) by name, of which ``in_features`` are read.

        A level may be a pair, for classes and for boxes, where the head takes such.
        """
        levels = [pyramid[name] for name in self.in_features]
        logits, boxes, quality, *refined = self.head(levels)
        numbers = self._by_place(boxes)
        # What only levels that are not read depend on gets a gradient of 0: processes that train together need one.
        for part in _parts(level for name, level in pyramid.items() if name not in self.in_features):
            numbers = numbers + part[:0].sum()
        return Predictions(
            self._by_place(logits),
            numbers,
            None if quality is None else self._by_place(quality).flatten(1),
            [tuple(level.shape[-2:]) for level in logits],
            *map(self._by_place, refined),
        )

    def losses(self, predictions: Predictions, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """The losses by name, each a scalar.

        Args:
            predictions: of :meth:`forward`.
            targets: of each image, in the pixels that the network saw.
        """
        # Autocast would take products of coordinates to half precision.
        with torch.autocast(predictions.logits.device.type, enabled=False):
            return self.criterion(self, predictions, targets)

    def detections(self, predictions: Predictions, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """What is found in each image; what is NaN is nothing, of which a warning tells once.

        Args:
            predictions: of :meth:`forward`.
            sizes: (height, width) of each image before padding, in the pixels that the network saw.
        """
        self._warn_of_nan(predictions)
        places = self.places(predictions)
        with torch.autocast(predictions.logits.device.type, enabled=False):
            return [self._detections_of(predictions, i, places, size) for i, size in enumerate(sizes)]

    def _by_place(self, levels: Sequence[Tensor]) -> Tensor:
        """(N, A*X, H, W) of every level to (N, R, X)."""
        anchors = self.anchors.per_cell
        return torch.cat(
            [level.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels], dim=1
        )

    def _warn_of_nan(self, predictions: Predictions) -> None:
        parts = predictions.values
        if not self._nan_told and any(part.isnan().any() for part in parts):
            self._nan_told = True
            places = torch.stack(
                [part.flatten(2).isnan().any(dim=2) if part.dim() > 2 else part.isnan() for part in parts]
            )
            _log.warning(
                "The detector's predictions are NaN at %d of %d places: nothing is detected there. Its weights or its "
                "images hold numbers that are NaN, infinite or very large", places.any(dim=0).sum(), places[0].numel(),
            )  # fmt: skip

    def places(self, predictions: Predictions) -> Places:
        """Where the predictions were made."""
        logits = predictions.logits
        return self.anchors(predictions.shapes, dtype=logits.dtype, device=logits.device)

    @torch.no_grad()
    def assign(self, places: Places, targets: Sequence[Targets]) -> Tensor:
        """Which object each place belongs to, (N, R); see :mod:`dyhead.detection.assigners`.

        Raises:
            ValueError: the detector has no assigner.
        """
        if self.assigner is None:
            raise ValueError("assign: the detector has no assigner; its criterion weighs places for objects instead")
        return torch.stack([self.assigner(places, target.boxes.to(places.anchors.dtype)) for target in targets])

    def _detections_of(self, predictions: Predictions, image: int, places: Places, size: tuple[int, int]) -> Detections:
        logits, quality, refined = (
            None if part is None else part[image]
            for part in (predictions.logits, predictions.quality, predictions.refined_logits)
        )
        thresholded, ranked, score = self.score(logits, quality, refined)
        chosen = (thresholded > self.inference.score_thresh) & ~score.isnan()
        numbers = predictions.boxes[image]
        found, first = [], 0
        for count, shape in zip(places.counts, predictions.shapes, strict=True):
            level = slice(first, first + count)
            first = first + count  # not in place: of a traced detector, it is a tensor that the slice has
            passes = chosen[level]
            if self.inference.peak_kernel > 1:
                passes = passes & are_peaks(ranked[level], shape, self.inference.peak_kernel)
            place, label = torch.nonzero(passes, as_tuple=True)
            rank = ranked[level][place, label]
            best = largest(rank, self.inference.topk)
            place, label = place[best], label[best]
            boxes = self.box_form.decode(numbers[level][place], places.anchors[level][place])
            known = ~boxes.isnan().any(dim=1)  # NMS would take one NaN to all boxes
            found.append((boxes[known], score[level][place, label][known], label[known]))
        boxes, scores, labels = (torch.cat(column) for column in zip(*found, strict=True))
        if self.inference.clip_before_nms:
            boxes, scores, labels = _inside(boxes, scores, labels, size)
        if self.inference.nms_thresh < 1:
            # To keep classes apart, it moves each by the largest coordinate: none may be negative.
            lowest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).min()
            keep = batched_nms(boxes - lowest, scores, labels, self.inference.nms_thresh)
        else:
            keep = scores.sort(descending=True, stable=True).indices
        keep = keep[: self.inference.limit]
        return Detections(*_inside(boxes[keep], scores[keep], labels[keep], size))


def largest(x: Tensor, count: int) -> Tensor:
    """The indices of the largest numbers, in their order, at most ``count``."""
    if torch.jit.is_tracing():  # where how many there are must not become a constant
        return x.sort(descending=True).indices[:count]
    return x.topk(min(count, len(x))).indices


def _parts(levels: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The maps that levels consist of, those that have a gradient."""
    for level in levels:
        yield from (part for part in (level if isinstance(level, tuple) else (level,)) if part.requires_grad)


def are_peaks(scores: Tensor, shape: tuple[int, int], kernel: int) -> Tensor:
    """Which scores (..., H*W*A, K) of a level are the largest of their anchor and class in a square around them."""
    maps = scores.unflatten(-2, (*shape, -1)).flatten(-2).movedim(-1, -3)
    known = maps.masked_fill(maps.isnan(), -torch.inf)  # a NaN would be the largest all around it
    largest = F.max_pool2d(known, kernel, stride=1, padding=kernel // 2)
    return (known == largest).movedim(-3, -1).reshape(scores.shape)


def _inside(boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of boxes inside an image of this (height, width)."""
    boxes = clip_boxes_to_image(boxes, size)
    left = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return boxes[left], scores[left], labels[left]
