"""RepPoints (Yang et al., "RepPoints: Point Set Representation for Object Detection", ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import BestKeptAssigner, PointAssigner
from dyhead.detection.boxes import Points
from dyhead.detection.boxes.points import KINDS
from dyhead.detection.criteria import TwoStage
from dyhead.detection.criteria.two_stage import StageWeights
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.heads import PointHead
from dyhead.detection.registry import register_detector
from dyhead.options import at_least, inherited, one_of, option, part


@register_detector("RepPoints")
@dataclass(frozen=True)
class RepPointsOptions(DenseOptions):
    """RepPoints: points of an object, refined once, and boxes around them; no anchors, no quality.

    The classes and the refined points are read at the first points, by deformable convolutions.
    """

    has_anchors = False
    loss_names = ("loss_cls", "loss_pts_init", "loss_pts_refine")

    predictor_kernel: int = inherited(DenseOptions, "predictor_kernel", 1)
    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives_per_image")
    nms_thresh_test: float = inherited(DenseOptions, "nms_thresh_test", 0.5)
    num_points: int = option(9, "points of a place", one_of(9, 25, 49))
    points_to_box: str = option(
        "moment",
        "a box from points. moment: their mean, and their standard deviation times a learned factor. minmax: the "
        "outermost points. partial_minmax: those of the first four",
        one_of(*KINDS),
    )
    moment_gradient: float = option(0.01, "what the gradient of that learned factor is multiplied by", at_least(0))
    points_gradient: float = option(
        0.1, "what the gradient to the first points through the deformable convolutions is multiplied by", at_least(0)
    )
    smooth_l1_loss_beta: float = option(
        0.11, "where smooth L1 goes over from the square to the absolute value; 0 is plain L1", at_least(0)
    )
    stage_weights: StageWeights = part(StageWeights())
    first_assigner: PointAssigner = part(PointAssigner())
    assigner: BestKeptAssigner = part(BestKeptAssigner())

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The corner of every cell."""
        return points_of(strides, offset=0.0)

    def build_head(self, channels: int, anchors: Anchors) -> PointHead:
        """With two sets of points."""
        return PointHead(
            channels,
            self.num_classes,
            num_points=self.num_points,
            points_gradient=self.points_gradient,
            num_levels=len(anchors.strides),
            **self.head_arguments(),
        )

    def build_box_form(self) -> Points:
        """With the factor to learn."""
        return Points(
            self.num_points,
            self.points_to_box,
            scale_gradient=self.moment_gradient,
            beta=self.smooth_l1_loss_beta,
            unit=self.first_assigner.point_base_scale,
        )

    def build_criterion(self) -> TwoStage:
        """With a normalizer of its own for the first points."""
        return TwoStage(self.first_assigner, self.build_normalizer(), self.stage_weights)
