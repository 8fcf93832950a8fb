"""ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection ...", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import ATSSAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.dense_options import DenseOptions, square_anchors
from dyhead.detection.detector import BoxLoss
from dyhead.detection.heads import DenseHead
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import inherited, part


@register_detector("ATSS")
@dataclass(frozen=True)
class ATSSOptions(DenseOptions):
    """ATSS: one square anchor a cell, deltas with a factor per level, centerness as the quality.

    The anchors are those of ``MODEL.ANCHOR_GENERATOR``; the paper's have sides of 8 strides.
    """

    loss_names = ("loss_cls", "loss_box_reg", "loss_centerness")

    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives")
    assigner: ATSSAssigner = part(ATSSAssigner())
    box_form: Deltas = part(Deltas(bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), bbox_reg_loss_type="giou"))
    box_loss: BoxLoss = part(BoxLoss(weight=2.0, by_centerness=True), prefix="BBOX_REG_LOSS_")
    score: Score = part(Score("product", score_thresh_on="class"))

    def default_anchors(self, strides: Sequence[int]) -> AnchorOptions:
        """The paper's."""
        return square_anchors(strides, offset=0.5)

    def build_head(self, channels: int, anchors: Anchors) -> DenseHead:
        """With the centerness, and a factor for each level."""
        return self.head(channels, anchors, quality="box", delta_scale=True)
