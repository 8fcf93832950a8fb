"""The paired-box model (Huang et al., "NMS by Representative Region", CVPR 2020): objects and their visible parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from dyhead.detection.anchors import AnchorOptions, Anchors, Places
from dyhead.detection.boxes import DeltaPairs
from dyhead.detection.criteria import PairedCriterion
from dyhead.detection.dense_options import DenseOptions
from dyhead.detection.detector import DenseDetector, Detections, Predictions, largest
from dyhead.detection.heads import DenseHead
from dyhead.detection.registry import register_detector
from dyhead.detection.roi.paired import FUSIONS, PairedHead
from dyhead.detection.visible_nms import r2nms
from dyhead.options import at_least, between, inherited, one_of, option, part

_LOSSES = ("loss_rpn_cls", "loss_rpn_whole", "loss_rpn_visible", "loss_cls", "loss_whole", "loss_visible")
_BOXES = ("whole", "visible")


class PairedDetector(DenseDetector):
    """A detector of two stages, both of which predict two boxes: an object and its visible part.

    The first is a dense head with one class, whose best pairs of boxes are proposals. The second pools both boxes.

    Args:
        regions: what predicts from the pooled regions.
        region_form: what its box numbers mean.
        num_classes: classes K.
        proposal_limit: proposals of an image.
        proposal_nms_thresh: largest IoU of two of them on a level.
        proposal_nms, nms: whether NMS compares "whole" boxes or "visible" ones.
        kwargs: of :class:`DenseDetector`.
    """

    def __init__(
        self,
        *,
        regions: PairedHead,
        region_form: DeltaPairs,
        num_classes: int,
        proposal_limit: int,
        proposal_nms_thresh: float,
        proposal_nms: str,
        nms: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.regions = regions
        self.region_form = region_form
        self.num_classes = num_classes
        self.proposal_limit = proposal_limit
        self.proposal_nms_thresh = proposal_nms_thresh
        self.proposal_nms = proposal_nms
        self.nms = nms

    def forward(self, pyramid: dict[str, Tensor]) -> Predictions:
        """What the first stage says, and the levels that the second one pools from."""
        levels = {name: pyramid[name] for name in self.in_features}
        return super().forward(pyramid)._replace(levels=levels)

    @torch.no_grad()
    def proposals(self, predictions: Predictions, image: int, size: tuple[int, int] | None = None) -> Tensor:
        """The best pairs of boxes (Q, 8) of an image, at most ``proposal_limit``, whole boxes first.

        Args:
            predictions: of :meth:`forward`.
            image: its index.
            size: its height and width before padding, which boxes are cut to; None: with padding.
        """
        places = self.places(predictions)
        if size is None:
            size = tuple(side * self.anchors.strides[0] for side in predictions.shapes[0])
        scores, numbers = predictions.logits[image, :, 0], predictions.boxes[image]
        found, first = [], 0
        for number, count in enumerate(places.counts):
            level = slice(first, first + count)
            first = first + count  # as in DenseDetector
            score = scores[level].nan_to_num(nan=-torch.inf)
            best = largest(score, self.inference.topk)
            pairs = self.box_form.decode(numbers[level][best], places.anchors[level][best])
            found.append((pairs, score[best], torch.full_like(best, number)))
        pairs, scores, levels = (torch.cat(column) for column in zip(*found, strict=True))
        pairs, there = _cut(pairs, size)
        there &= scores > -torch.inf
        pairs, scores, levels = pairs[there], scores[there], levels[there]
        return pairs[_nms(self.proposal_nms, pairs, scores, levels, self.proposal_nms_thresh)[: self.proposal_limit]]

    def _detections_of(self, predictions: Predictions, image: int, places: Places, size: tuple[int, int]) -> Detections:
        proposals = self.proposals(predictions, image, size)
        levels = {name: level[image : image + 1] for name, level in predictions.levels.items()}
        logits, numbers = self.regions(levels, [proposals])
        scores = logits.softmax(dim=1)[:, :-1]
        pairs, there = _cut(self.region_form.decode(numbers, proposals), size)
        place, label = torch.nonzero((scores > self.inference.score_thresh) & there[:, None], as_tuple=True)
        pairs, score = pairs[place], scores[place, label]
        if self.inference.nms_thresh < 1:
            keep = _nms(self.nms, pairs, score, label, self.inference.nms_thresh)
        else:
            keep = score.sort(descending=True, stable=True).indices
        keep = keep[: self.inference.limit]
        return Detections(pairs[keep, :4], score[keep], label[keep], pairs[keep, 4:])


def _cut(pairs: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pairs of boxes cut to an image of this (height, width), and of which pairs something is left of both."""
    pairs = clip_boxes_to_image(pairs.unflatten(1, (2, 4)), size).flatten(1)
    return pairs, ((pairs[:, 2:4] > pairs[:, :2]) & (pairs[:, 6:] > pairs[:, 4:6])).all(dim=1)


def _nms(boxes: str, pairs: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """The indices of what NMS by whole or by visible boxes keeps; the boxes lie inside an image."""
    if boxes == "visible":
        return r2nms(pairs[:, 4:], scores, groups, threshold)
    return batched_nms(pairs[:, :4], scores, groups, threshold)


class _AnchorHead(DenseHead):
    """The head of the first stage. The second pools from levels, not from pairs of them."""

    takes_task_levels = False


@register_detector("PairedBox")
@dataclass(frozen=True)
class PairedBoxOptions(DenseOptions):
    """The paired-box model: Faster R-CNN that predicts of each object all of it and its visible part.

    NMS compares the visible boxes (R2NMS). The authors published no code: what the paper leaves open is an option, or
    is as in Faster R-CNN. Nobody has verified the defaults of the thresholds.
    """

    reads_visible_boxes = True
    loss_names = _LOSSES
    # The criterion has these of its own: the detector's node has no such keys.
    class_loss: ClassVar[None] = None
    loss_normalizer: ClassVar[None] = None
    # Boxes are cut to the image before NMS.
    clip_boxes: ClassVar[str] = "before_nms"

    in_features: tuple[str, ...] = inherited(DenseOptions, "in_features", ("p2", "p3", "p4", "p5", "p6"))
    num_convs: int = inherited(DenseOptions, "num_convs", 1)
    predictor_kernel: int = inherited(DenseOptions, "predictor_kernel", 1)
    prior_prob: float = inherited(DenseOptions, "prior_prob", 0.5)
    topk_candidates_test: int = option(
        1000, "so many best of every level go to the proposals' NMS, in training, too", at_least(1)
    )
    nms_thresh_test: float = inherited(DenseOptions, "nms_thresh_test", 0.5)
    nms: str = option("visible", "the boxes whose IoU that is: visible (R2NMS) or whole", one_of(*_BOXES))
    proposals: int = option(1000, "proposals of an image, at most", at_least(1))
    proposal_nms_thresh: float = option(0.7, "largest IoU of two proposals of a level", between(0, 1))
    proposal_nms: str = option("whole", "the boxes whose IoU that is: visible or whole", one_of(*_BOXES))
    pooler_resolution: int = option(7, "side of a pooled region, in cells", at_least(1))
    pooler_sampling_ratio: int = option(0, "samples in a cell, per axis; 0: as many as there are pixels", at_least(0))
    num_fc: int = option(2, "fully connected layers on the regions' features", at_least(1))
    fc_dim: int = option(1024, "features of each of them", at_least(1))
    fusion: str = option(
        "concat",
        "how features of whole and visible regions are put together: side by side, or masked: likewise, after cells of "
        "the whole region outside the visible one are set to 0",
        one_of(*FUSIONS),
    )
    box_form: DeltaPairs = part(DeltaPairs(smooth_l1_loss_beta=0.0), prefix="RPN_")
    region_form: DeltaPairs = part(DeltaPairs((10.0, 10.0, 5.0, 5.0), smooth_l1_loss_beta=0.0))
    criterion: PairedCriterion = part(PairedCriterion())

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> PairedDetector:
        """See :meth:`DenseOptions.build`."""
        grid = self.build_anchors(strides, anchors or self.default_anchors(strides))
        return PairedDetector(
            head=self.build_head(channels, grid),
            in_features=self.in_features,
            anchors=grid,
            box_form=self.box_form,
            assigner=None,
            class_loss=None,
            score=self.score,
            normalizer=None,
            inference=self.inference(detections_per_image),
            loss_names=self.loss_names,
            criterion=self.criterion,
            regions=PairedHead(
                channels,
                dict(zip(self.in_features, strides, strict=True)),
                self.num_classes,
                resolution=self.pooler_resolution,
                sampling_ratio=self.pooler_sampling_ratio,
                num_fc=self.num_fc,
                fc_dim=self.fc_dim,
                fusion=self.fusion,
            ),
            region_form=self.region_form,
            num_classes=self.num_classes,
            proposal_limit=self.proposals,
            proposal_nms_thresh=self.proposal_nms_thresh,
            proposal_nms=self.proposal_nms,
            nms=self.nms,
        )

    def build_head(self, channels: int, anchors: Anchors) -> DenseHead:
        """Of the first stage, with one class."""
        return _AnchorHead(
            channels,
            1,
            anchors.per_cell,
            num_levels=len(anchors.strides),
            box_numbers=self.box_form.per_place,
            **self.head_arguments(),
        )
