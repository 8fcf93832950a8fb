"""RetinaNet that learns from noisy anchors (Li et al., "Learning From Noisy Anchors ...", CVPR 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from dyhead.detection.assigners import TopIoUAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.criteria import NoisyAnchorsCriterion
from dyhead.detection.dense_options import DenseOptions
from dyhead.detection.losses import SoftFocalLoss
from dyhead.detection.registry import register_detector
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
