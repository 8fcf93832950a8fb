"""GFL (Li et al., "Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes ...", NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dyhead.detection.anchors import AnchorOptions, Anchors, Places
from dyhead.detection.assigners import ATSSAssigner
from dyhead.detection.boxes import Distribution
from dyhead.detection.criteria import QualityCriterion
from dyhead.detection.dense_options import DenseOptions, anchors_of, points_of
from dyhead.detection.detector import DenseDetector
from dyhead.detection.losses import QualityFocalLoss
from dyhead.detection.normalizer import LossNormalizer
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import inherited, part


@register_detector("GFL")
@dataclass(frozen=True)
class GFLOptions(DenseOptions):
    """GFL: ATSS whose class probability is the quality, and whose boxes are distributions with a factor per level.

    The anchors, one a cell, are those of ``MODEL.ANCHOR_GENERATOR``, and serve the assignment only; the paper's have
    sides of 8 strides, and ``OFFSET`` 0. Boxes are relative to their centers, in strides.
    """

    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives_per_image")
    class_loss: QualityFocalLoss = part(QualityFocalLoss(), prefix="QUALITY_FOCAL_LOSS_")
    assigner: ATSSAssigner = part(ATSSAssigner())
    box_form: Distribution = part(Distribution())
    criterion: QualityCriterion = part(QualityCriterion())

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> DenseDetector:
        """See :meth:`DenseOptions.build`."""
        grid = anchors_of(anchors or AnchorOptions(tuple((8 * s,) for s in strides), ((1.0,),), 0.0), strides)
        if grid.per_cell != 1:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR: expected one anchor a cell, got {grid.per_cell}")
        return DenseDetector(
            head=self.head(channels, len(strides), delta_scale=True, box_numbers=self.box_form.per_place),
            in_features=self.in_features,
            anchors=points_of(strides, grid.offset),
            box_form=self.box_form,
            assigner=_OnAnchors(self.assigner, grid),
            class_loss=self.class_loss,
            score=Score("class"),
            normalizer=LossNormalizer(self.loss_normalizer),
            inference=self.inference(detections_per_image),
            loss_names=("loss_cls", "loss_box_reg", "loss_dfl"),
            criterion=self.criterion,
        )


@dataclass(frozen=True)
class _OnAnchors:
    """An assigner that gets other anchors than the boxes are relative to, around the same centers."""

    assigner: ATSSAssigner
    anchors: Anchors

    def __call__(self, places: Places, boxes: Tensor) -> Tensor:
        """See :mod:`dyhead.detection.assigners`."""
        around = places.by_level([cell for (cell,) in self.anchors.cells])
        return self.assigner(places._replace(anchors=places.centers.repeat(1, 2) + around), boxes)
