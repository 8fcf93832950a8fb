"""BorderDet (Qiu et al., "BorderDet: Border Feature for Dense Object Detection", ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import CenterAssigner, OverlapAssigner
from dyhead.detection.boxes import Borders
from dyhead.detection.criteria import BorderCriterion, BorderWeights
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.detector import BoxLoss
from dyhead.detection.fcos import FCOSOptions
from dyhead.detection.heads import BorderHead
from dyhead.detection.heads.border import BORDER_NORMS
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import RefinedScore
from dyhead.options import at_least, between, inherited, one_of, option, part


@register_detector("BorderDet")
@dataclass(frozen=True)
class BorderDetOptions(FCOSOptions):
    """BorderDet: FCOS, whose boxes are refined once by the features along their four sides.

    Points are the corners of cells, not their centers: a level's first is at (0, 0).
    """

    loss_names = ("loss_cls", "loss_box_reg", "loss_centerness", "loss_border_cls", "loss_border_reg")

    loss_normalizer: str = inherited(DenseOptions, "loss_normalizer", "positives")
    assigner: CenterAssigner = part(CenterAssigner(closed_ranges=True))
    box_form: Borders = part(Borders())
    box_loss: BoxLoss = part(BoxLoss(by_centerness=True, smallest_sum=1.0), prefix="BBOX_REG_LOSS_")
    score: RefinedScore = part(RefinedScore())
    scale_per_level: bool = inherited(FCOSOptions, "scale_per_level", True)
    border_assigner: OverlapAssigner = part(OverlapAssigner())
    border_weights: BorderWeights = part(BorderWeights())
    border_class_channels: int = option(256, "channels of each side that classes are predicted from", at_least(1))
    border_box_channels: int = option(128, "channels of each side that boxes are refined from", at_least(1))
    border_pool_size: int = option(10, "parts of a side; it is read between them and at its ends", between(1, 255))
    border_norm: str = option(
        "IN",
        "of what is read at cells and sides: instance normalization (on a level of a single pixel the result is 0), or "
        "none",
        one_of(*BORDER_NORMS),
    )

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The corner of every cell."""
        return points_of(strides, offset=0.0)

    def build_head(self, channels: int, anchors: Anchors) -> BorderHead:
        """With the border modules."""
        return BorderHead(
            channels,
            self.num_classes,
            class_channels=self.border_class_channels,
            box_channels=self.border_box_channels,
            pool_size=self.border_pool_size,
            border_norm=self.border_norm,
            num_levels=len(anchors.strides),
            quality=self.centerness_on,
            delta_scale=self.scale_per_level,
            **self.head_arguments(),
        )

    def build_criterion(self) -> BorderCriterion:
        """With a normalizer of its own for the second stage."""
        return BorderCriterion(self.border_assigner, self.build_normalizer(), self.border_weights)
