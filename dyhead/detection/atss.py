"""ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection ...", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import ATSSAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.dense_options import DenseOptions, anchors_of
from dyhead.detection.detector import BoxLoss, DenseDetector
from dyhead.detection.normalizer import LossNormalizer
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import inherited, part


@register_detector("ATSS")
@dataclass(frozen=True)
class ATSSOptions(DenseOptions):
    """ATSS: one square anchor a cell, deltas with a factor per level, centerness as the quality.

    The anchors are those of ``MODEL.ANCHOR_GENERATOR``; the paper's have sides of 8 strides.
    """

    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives")
    assigner: ATSSAssigner = part(ATSSAssigner())
    box_form: Deltas = part(Deltas(bbox_reg_weights=(10.0, 10.0, 5.0, 5.0), bbox_reg_loss_type="giou"))
    box_loss: BoxLoss = part(BoxLoss(weight=2.0, by_centerness=True), prefix="BBOX_REG_LOSS_")
    score: Score = part(Score("product", score_thresh_on="class"))

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> DenseDetector:
        """See :meth:`DenseOptions.build`."""
        grid = anchors_of(anchors or AnchorOptions(tuple((8 * s,) for s in strides), ((1.0,),), 0.5), strides)
        return DenseDetector(
            head=self.head(
                channels,
                len(strides),
                grid.per_cell,
                quality="box",
                delta_scale=True,
                box_numbers=self.box_form.per_place,
            ),
            in_features=self.in_features,
            anchors=grid,
            box_form=self.box_form,
            assigner=self.assigner,
            class_loss=self.class_loss,
            score=self.score,
            normalizer=LossNormalizer(self.loss_normalizer),
            box_loss=self.box_loss,
            inference=self.inference(detections_per_image),
            loss_names=("loss_cls", "loss_box_reg", "loss_centerness"),
        )
