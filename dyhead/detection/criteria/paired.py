"""The criterion of the paired-box model (Huang et al., CVPR 2020): proposals and regions, two boxes each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dyhead.detection.assigners.labels import BACKGROUND
from dyhead.detection.assigners.paired import PairedAnchorAssigner, PairedRegionAssigner
from dyhead.detection.normalizer import divisor_of
from dyhead.options import at_least, between, option, part

if TYPE_CHECKING:
    from dyhead.detection.detector import Predictions, Targets
    from dyhead.detection.paired_box import PairedDetector


@dataclass(frozen=True)
class PairedCriterion:
    """Random samples of anchors and of proposals cost; visible boxes as the whole ones do.

    Each loss is divided by the size of its sample: that which the anchors' should have, and that which the proposals'
    has. The losses are those of the anchors' classes, whole and visible boxes, and the same of the proposals.
    """

    anchor_assigner: PairedAnchorAssigner = part(PairedAnchorAssigner(), prefix="RPN_")
    region_assigner: PairedRegionAssigner = part(PairedRegionAssigner())
    rpn_batch_size_per_image: int = option(256, "anchors of an image that cost something", at_least(1))
    rpn_positive_fraction: float = option(0.5, "the objects' among them, at most", between(0, 1))
    batch_size_per_image: int = option(512, "proposals of an image that cost something", at_least(1))
    positive_fraction: float = option(0.25, "the objects' among them, at most", between(0, 1))
    proposal_append_gt: bool = option(True, "add the objects to the proposals")
    whole_loss_weight: float = option(1.0, "what the losses of whole boxes are multiplied by", at_least(0))
    visible_loss_weight: float = option(1.0, "what those of visible boxes are multiplied by", at_least(0))
    negative_visible_scale: float = option(
        0.0,
        "train the visible boxes of proposals that are background, too: towards the proposal's center, with so much of "
        "its width and height, as Bi-box does; 0: do not",
        at_least(0),
    )

    def __call__(
        self, detector: PairedDetector, predictions: Predictions, targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See :mod:`dyhead.detection.criteria`."""
        truth = [_pairs_of(target, predictions.boxes.dtype) for target in targets]
        losses = [*self._anchor_losses(detector, predictions, truth)]
        losses += self._region_losses(detector, predictions, truth, [target.labels for target in targets])
        return dict(zip(detector.loss_names, losses, strict=True))

    def _anchor_losses(
        self, detector: PairedDetector, predictions: Predictions, truth: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        anchors = detector.places(predictions).anchors
        image, place, owner = [], [], []
        for i, pairs in enumerate(truth):
            assigned = self.anchor_assigner(anchors, pairs[:, :4], pairs[:, 4:])
            chosen = sample(assigned, self.rpn_batch_size_per_image, self.rpn_positive_fraction)
            image.append(torch.full_like(chosen, i))
            place.append(chosen)
            owner.append(assigned[chosen])
        positive = [own >= 0 for own in owner]
        matched = torch.cat([pairs[own[p]] for pairs, own, p in zip(truth, owner, positive, strict=True)])
        image, place, positive = torch.cat(image), torch.cat(place), torch.cat(positive)
        logits = predictions.logits[image, place, 0]
        divisor = divisor_of(logits.new_tensor(float(len(truth) * self.rpn_batch_size_per_image)), 1)
        loss_class = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="sum")
        image, place = image[positive], place[positive]
        costs = detector.box_form.loss(predictions.boxes[image, place], anchors[place], matched).sum(dim=0)
        return loss_class / divisor, *self._weighed(costs, divisor)

    def _region_losses(
        self, detector: PairedDetector, predictions: Predictions, truth: list[Tensor], labels: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        regions, classes, matched = [], [], []
        for i, (pairs, own_labels) in enumerate(zip(truth, labels, strict=True)):
            proposals = detector.proposals(predictions, i)
            if self.proposal_append_gt:
                proposals = torch.cat([proposals, pairs])
            assigned = self.region_assigner(proposals, pairs[:, :4], pairs[:, 4:])
            chosen = sample(assigned, self.batch_size_per_image, self.positive_fraction)
            owner = assigned[chosen]
            regions.append(proposals[chosen])
            background = torch.full_like(owner, detector.num_classes)
            classes.append(background.masked_scatter(owner >= 0, own_labels[owner[owner >= 0]]))
            matched.append(pairs[owner[owner >= 0]])
        logits, numbers = detector.regions(predictions.levels, regions)
        classes, regions = torch.cat(classes), torch.cat(regions)
        divisor = divisor_of(logits.new_tensor(float(len(classes))), 1)
        positive = classes < detector.num_classes
        form = detector.region_form
        costs = form.loss(numbers[positive], regions[positive], torch.cat(matched)).sum(dim=0)
        if self.negative_visible_scale:
            own = regions[~positive]
            small = torch.cat([own[:, :4], _around_center(own[:, :4], self.negative_visible_scale)], dim=1)
            costs = costs + form.loss(numbers[~positive], own, small).sum(dim=0) * costs.new_tensor([0.0, 1.0])
        loss_class = F.cross_entropy(logits, classes, reduction="sum")
        return loss_class / divisor, *self._weighed(costs, divisor)

    def _weighed(self, costs: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole_loss_weight * costs[0] / divisor, self.visible_loss_weight * costs[1] / divisor


def sample(assigned: Tensor, count: int, positive_fraction: float) -> Tensor:
    """Random places: an object's, at most that part of ``count``, and background up to ``count``; their indices.

    Args:
        assigned: objects, or what :mod:`dyhead.detection.assigners` has for none, (R,).
        count: places, if there are as many.
        positive_fraction: of ``count``.
    """
    positive = _some(torch.where(assigned >= 0)[0], int(count * positive_fraction))
    return torch.cat([positive, _some(torch.where(assigned == BACKGROUND)[0], count - len(positive))])


def _some(places: Tensor, limit: int) -> Tensor:
    if len(places) <= limit:
        return places
    return places[torch.randperm(len(places), device=places.device)[:limit]]


def _pairs_of(target: Targets, dtype: torch.dtype) -> Tensor:
    visible = target.boxes if target.visible is None else target.visible
    return torch.cat([target.boxes, visible], dim=1).to(dtype)


def _around_center(boxes: Tensor, scale: float) -> Tensor:
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * scale / 2
    return torch.cat([center - half, center + half], dim=1)
