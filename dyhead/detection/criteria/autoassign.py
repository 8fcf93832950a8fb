"""The criterion of AutoAssign (Zhu et al., "AutoAssign: Differentiable Label Assignment ...", 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from dyhead.detection.anchors import Places
from dyhead.detection.boxes.sides import sides_of
from dyhead.detection.normalizer import divisor_of
from dyhead.options import at_least, option

if TYPE_CHECKING:
    from dyhead.detection.detector import DenseDetector, Predictions, Targets

_EPSILON = 1e-12
_LOWEST_LOG = -100.0  # what an object without any candidate costs


@dataclass(frozen=True)
class SoftAssignment:
    """How much each part counts, and what is done for objects that no place lies in."""

    bbox_reg_loss_weight: float = option(
        5.0, "what a place's box loss L is multiplied by in its likelihood, p * exp(-weight * L)", at_least(0)
    )
    positive_loss_weight: float = option(0.25, "what the loss of the objects is multiplied by", at_least(0))
    negative_loss_weight: float = option(0.75, "what the loss of the background is multiplied by", at_least(0))
    center_loss_weight: float = option(
        0.75, "what the loss that keeps the center priors from vanishing is multiplied by", at_least(0)
    )
    temperature: float = option(1 / 3, "a place counts exp(likelihood / temperature) for its object", at_least(0.02))
    force_topk: int = option(
        0,
        "an object that no place lies in has so many places as candidates, those of the largest center prior; 0: none, "
        "it then costs a constant and teaches nothing. mmdetection's force_topk is 9",
        at_least(0),
    )


class Candidates(NamedTuple):
    """Pairs of a place and an object of one image that it may be a positive of, P in all, place after place.

    Attributes:
        place: (P,), 0 to R - 1.
        owner: (P,), the object, 0 to M - 1.
        prior: (P,), the center prior G, above 0 and up to 1.
        overlap: (P,), the largest IoU of the place's box with any object of the image, without a gradient.
    """

    place: Tensor
    owner: Tensor
    prior: Tensor
    overlap: Tensor


class AutoAssignCriterion(nn.Module):
    r"""Every place inside an object is its positive and the background's negative, each with a weight that is learned.

    With the probability :math:`p = \sigma(class) \sigma(quality)` of an object's class, the box loss :math:`L` and
    :math:`q = p \exp(-\lambda L)`, an object with the candidates :math:`i` costs

    .. math:: -\log \sum_i w_i q_i, \quad w_i = \frac{C_i G_i}{\sum_j C_j G_j}, \quad C = \exp(q / \tau)

    divided by the objects. Gradients pass through the weights. With the distance :math:`d` of a place from the box's
    center in strides, the center prior is :math:`G = \exp(-\sum_{x, y} (d - \mu)^2 / (2 \sigma^2))`.

    A place and a class cost :math:`-r^2 \log(1 - r)`, :math:`r = p (1 - f)`, divided by the sum of all priors. Where
    the place is a candidate of an object of the class, :math:`f` is :math:`1 / (1 - u)`, stretched linearly to 0 to 1
    over the object's candidates; :math:`u` is the largest IoU of the place's box with *any* object of the image, as in
    the published code. Of several objects of the class the last counts. Elsewhere :math:`f` is 0.

    The third loss is the mean over images of objects divided by the sum of priors, 0 where there are no candidates.

    Objects, priors and images are averaged over devices before anything is divided by them; objects and priors are at
    least 1.

    Args:
        num_classes: classes K.
        options: weights, and what is done for objects that no place lies in.

    Attributes:
        mean: (K, 2) as x, y, :math:`\mu` of each class in strides, learned, starting at 0.
        deviation: (K, 2), :math:`\sigma`, learned, starting at 1.

    In a checkpoint these are ``detector.criterion.mean`` and ``detector.criterion.deviation``.
    """

    def __init__(self, num_classes: int, options: SoftAssignment = SoftAssignment()) -> None:
        super().__init__()
        self.options = options
        self.mean = nn.Parameter(torch.zeros(num_classes, 2))
        self.deviation = nn.Parameter(torch.ones(num_classes, 2))

    def forward(
        self, detector: DenseDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """The losses of the objects, of the background and of the priors; see :mod:`dyhead.detection.criteria`."""
        places = detector.places(predictions)
        parts = [self._of_image(detector, predictions, image, places, target) for image, target in enumerate(targets)]
        positive, negative, center, prior = (torch.stack(column) for column in zip(*parts, strict=True))
        objects = sum(len(target.boxes) for target in targets)
        counts = torch.stack([prior.detach().sum(), *prior.new_tensor([objects, len(targets)])])
        priors, objects, images = divisor_of(counts, 1)
        options = self.options
        losses = (
            options.positive_loss_weight * positive.sum() / objects,
            options.negative_loss_weight * negative.sum() / priors,
            options.center_loss_weight * center.sum() / images,
        )
        return dict(zip(detector.loss_names, losses, strict=True))

    def candidates(
        self, detector: DenseDetector, predictions: Predictions, image: int, places: Places, target: Targets
    ) -> Candidates:
        """The candidates of the objects of one of the images."""
        numbers, boxes, labels = predictions.boxes[image], target.boxes.to(places.anchors.dtype), target.labels
        with torch.no_grad():
            inside = (sides_of(boxes, places.centers[:, None]) > 0).all(dim=2)  # (R, M)
            if self.options.force_topk:
                (empty,) = torch.nonzero(~inside.any(dim=0), as_tuple=True)
                everywhere = self._log_prior(places, boxes[empty], labels[empty])
                best = everywhere.topk(min(self.options.force_topk, len(everywhere)), dim=0).indices
                inside[best, empty] = True
            place, owner = torch.nonzero(inside, as_tuple=True)
            covered = inside.any(dim=1)
            overlap = numbers.new_zeros(len(inside))
            if len(place):
                found = detector.box_form.decode(numbers[covered], places.anchors[covered])
                overlap[covered] = box_iou(found, boxes).amax(dim=1)
        distance = self._distance(places, boxes)[place, owner]
        log_prior = _log_normal(distance, self.mean[labels[owner]], self.deviation[labels[owner]])
        return Candidates(place, owner, log_prior.exp(), overlap[place])

    def _of_image(
        self, detector: DenseDetector, predictions: Predictions, image: int, places: Places, target: Targets
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What its objects, its background and its priors cost, and the sum of the priors; nothing is divided yet."""
        place, owner, prior, overlap = self.candidates(detector, predictions, image, places, target)
        numbers, boxes, labels = predictions.boxes[image], target.boxes.to(places.anchors.dtype), target.labels
        probability = predictions.logits[image].sigmoid() * predictions.quality[image].sigmoid()[:, None]

        box_loss = detector.box_form.loss(numbers[place], places.anchors[place], boxes[owner])
        likelihood = probability[place, labels[owner]] * (-self.options.bbox_reg_loss_weight * box_loss).exp()
        weight = (likelihood / self.options.temperature).exp() * prior
        none = likelihood.new_zeros(len(boxes))
        total = none.index_add(0, owner, weight).clamp(min=_EPSILON)
        positive = -_log(none.index_add(0, owner, weight * likelihood) / total)

        left = probability * self._background(probability, place, owner, labels, overlap)
        negative = -(left**2) * _log(1 - left)

        priors = prior.sum()
        center = len(boxes) / priors.clamp(min=_EPSILON) if len(place) else priors
        return positive.sum(), negative.sum(), center, priors

    @staticmethod
    @torch.no_grad()
    def _background(probability: Tensor, place: Tensor, owner: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
        """(R, K), how much each place and class is background, 1 - f."""
        share = 1 / (1 - overlap).clamp(min=_EPSILON)
        bounds = share.new_zeros(len(labels))
        low = bounds.scatter_reduce(0, owner, share, "amin", include_self=False)[owner]
        high = bounds.scatter_reduce(0, owner, share, "amax", include_self=False)[owner]
        share = (share - low + _EPSILON) / (high - low + _EPSILON)
        # Writing to a place twice would leave it to chance, which of the objects counts.
        entry = place * probability.shape[1] + labels[owner]
        last = owner.new_zeros(probability.numel()).scatter_reduce(0, entry, owner, "amax")
        counts = owner == last[entry]
        weights = torch.ones_like(probability).flatten()
        weights[entry[counts]] = 1 - share[counts]
        return weights.view_as(probability)

    def _log_prior(self, places: Places, boxes: Tensor, labels: Tensor) -> Tensor:
        """(R, M), of every place and object, whether inside or not."""
        return _log_normal(self._distance(places, boxes), self.mean[labels], self.deviation[labels])

    @staticmethod
    def _distance(places: Places, boxes: Tensor) -> Tensor:
        """(R, M, 2) as x, y, from the boxes' centers in strides."""
        strides = places.by_level(places.strides)[:, None, None]
        return (places.centers[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2) / strides


def _log_normal(distance: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(...,), from (..., 2) each; its largest value is 0."""
    return -((distance - mean) ** 2 / (2 * deviation**2)).sum(dim=-1)


def _log(x: Tensor) -> Tensor:
    """The logarithm, at least -100; without a gradient where x is 0, and NaN where x is."""
    zero = x == 0
    return x.masked_fill(zero, 1).log().masked_fill(zero, _LOWEST_LOG).clamp(min=_LOWEST_LOG)
