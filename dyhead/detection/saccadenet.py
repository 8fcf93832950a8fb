"""SaccadeNet (Lan et al., "SaccadeNet: A Fast and Accurate Object Detector", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.boxes import Centers
from dyhead.detection.criteria import CenterCriterion
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.detector import Inference
from dyhead.detection.heads import CenterHead
from dyhead.detection.heads.centers import AGGREGATIONS
from dyhead.detection.losses import GaussianFocalLoss
from dyhead.detection.registry import register_detector
from dyhead.options import Check, at_least, inherited, odd, one_of, option, part

_LOSSES = ("loss_heatmap", "loss_corner", "loss_center", "loss_size", "loss_refined_size", "loss_refined_center")


@register_detector("SaccadeNet")
@dataclass(frozen=True)
class SaccadeNetOptions(DenseOptions):
    """SaccadeNet: objects are peaks of heatmaps on one fine level, and their sizes are refined by what is at the box.

    There are no anchors, no quality and no NMS. Corners are predicted in training only.
    """

    has_anchors = False
    # The criterion counts for itself.
    loss_normalizer: ClassVar[None] = None

    in_features: tuple[str, ...] = option(
        ("p2",), "the level to predict on", Check("exactly one level", lambda names: len(names) == 1)
    )
    predictor_kernel: int = inherited(DenseOptions, "predictor_kernel", 1)
    prior_prob: float = inherited(DenseOptions, "prior_prob", 0.1)
    score_thresh_test: float = inherited(DenseOptions, "score_thresh_test", 0.0)
    nms_thresh_test: float = inherited(DenseOptions, "nms_thresh_test", 1.0)
    head_channels: int = option(256, "channels of the 3x3 convolution before each predictor", at_least(1))
    aggregation: str = option(
        "nine",
        "where a box is looked at to refine its size. nine: corners, middles of sides, a learned position. corners: "
        "without the middles. corners_as_published: the lower right corner's tap is in the middle of the right side, "
        "as the published code has it by a mistake",
        one_of(*AGGREGATIONS),
    )
    size_gradient: float = option(
        0.01, "what the gradient to the first sizes through these positions is multiplied by", at_least(0)
    )
    refine_center: bool = option(False, "refine the center, too")
    peak_kernel: int = option(
        3,
        "a detection has the largest score of its class in a square of so many cells around its own; 1: any may",
        odd(),
    )
    class_loss: GaussianFocalLoss = part(GaussianFocalLoss(), prefix="GAUSSIAN_FOCAL_LOSS_")
    criterion: CenterCriterion = part(CenterCriterion())

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The last one is that of refined centers."""
        return _LOSSES if self.refine_center else _LOSSES[:-1]

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The corner of every cell of one level."""
        if len(strides) != 1:
            raise ValueError(f"IN_FEATURES: expected exactly one level, got {len(strides)}")
        return points_of(strides, offset=0.0)

    def build_head(self, channels: int, anchors: Anchors) -> CenterHead:
        """With an aggregation."""
        return CenterHead(
            channels,
            self.num_classes,
            hidden=self.head_channels,
            points=self.aggregation,
            size_gradient=self.size_gradient,
            refine_center=self.refine_center,
            **self.head_arguments(),
        )

    def build_box_form(self) -> Centers:
        """Whose centers may be refined."""
        return Centers(self.refine_center)

    def inference(self, detections_per_image: int) -> Inference:
        """With peaks."""
        return replace(super().inference(detections_per_image), peak_kernel=self.peak_kernel)
