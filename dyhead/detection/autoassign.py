"""AutoAssign (Zhu et al., "AutoAssign: Differentiable Label Assignment for Dense Object Detection", 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.boxes import Distances
from dyhead.detection.criteria.autoassign import AutoAssignCriterion, SoftAssignment
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.heads import DenseHead
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import inherited, part

# Boxes start with sides of 8 strides, so that those of the right level overlap their objects.
_FIRST_DISTANCE = 4.0


@register_detector("AutoAssign")
@dataclass(frozen=True)
class AutoAssignOptions(DenseOptions):
    """AutoAssign: FCOS's head, in which how much a place is an object's is learned, with an objectness as the quality.

    Points are the corners of cells, not their centers: a level's first is at (0, 0).
    """

    has_anchors = False
    loss_names = ("loss_positive", "loss_negative", "loss_center")
    # The criterion has these of its own: the detector's node has no such keys.
    class_loss: ClassVar[None] = None
    loss_normalizer: ClassVar[None] = None

    prior_prob: float = inherited(DenseOptions, "prior_prob", 0.02)
    criterion: SoftAssignment = part(SoftAssignment())
    box_form: Distances = part(Distances())
    score: Score = part(Score("product", score_thresh_on="class", topk_by="class"))

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The corner of every cell."""
        return points_of(strides, offset=0.0)

    def build_head(self, channels: int, anchors: Anchors) -> DenseHead:
        """With the objectness, a factor for each level, and boxes of some size from the start."""
        head = self.head(channels, anchors, quality="box", delta_scale=True)
        nn.init.constant_(head.deltas.bias, _FIRST_DISTANCE)
        return head

    def build_criterion(self) -> AutoAssignCriterion:
        """With the priors to learn."""
        return AutoAssignCriterion(self.num_classes, self.criterion)
