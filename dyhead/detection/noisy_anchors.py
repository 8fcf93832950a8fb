"""RetinaNet that learns from noisy anchors (Li et al., "Learning From Noisy Anchors ...", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import TopIoUAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.criteria import NoisyAnchorsCriterion
from dyhead.detection.dense_options import DenseOptions, anchors_of
from dyhead.detection.detector import DenseDetector
from dyhead.detection.losses import SoftFocalLoss
from dyhead.detection.normalizer import LossNormalizer
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import inherited, part


@register_detector("NoisyAnchors")
@dataclass(frozen=True)
class NoisyAnchorsOptions(DenseOptions):
    """Learning from Noisy Anchors: RetinaNet with soft labels and weights of each object's best anchors."""

    num_convs: int = inherited(DenseOptions, "num_convs", 4)
    nms_thresh_test: float = inherited(DenseOptions, "nms_thresh_test", 0.5)
    class_loss: SoftFocalLoss = part(SoftFocalLoss(), prefix="SOFT_FOCAL_LOSS_")
    assigner: TopIoUAssigner = part(TopIoUAssigner())
    box_form: Deltas = part(Deltas())
    criterion: NoisyAnchorsCriterion = part(NoisyAnchorsCriterion())

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> DenseDetector:
        """See :meth:`DenseOptions.build`."""
        grid = anchors_of(anchors or AnchorOptions(), strides)
        return DenseDetector(
            head=self.head(channels, len(strides), grid.per_cell, box_numbers=self.box_form.per_place),
            in_features=self.in_features,
            anchors=grid,
            box_form=self.box_form,
            assigner=self.assigner,
            class_loss=self.class_loss,
            score=Score("class"),
            normalizer=LossNormalizer(self.loss_normalizer, initial=100),
            inference=self.inference(detections_per_image),
            loss_names=("loss_cls", "loss_box_reg"),
            criterion=self.criterion,
        )
