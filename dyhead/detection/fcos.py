"""FCOS (Tian et al., ICCV 2019 and PAMI 2021), as Detectron2 has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import CenterAssigner
from dyhead.detection.boxes import Distances
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.detector import BoxLoss
from dyhead.detection.heads import DenseHead
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import one_of, option, part


@register_detector("FCOS")
@dataclass(frozen=True)
class FCOSOptions(DenseOptions):
    """FCOS: one point a cell, boxes as distances from it, centerness as the quality."""

    has_anchors = False
    loss_names = ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")
    first_average = 300.0

    assigner: CenterAssigner = part(CenterAssigner())
    box_form: Distances = part(Distances())
    box_loss: BoxLoss = part(BoxLoss(), prefix="BBOX_REG_LOSS_")
    score: Score = part(Score("root"))
    centerness_on: str = option("box", "the tower that the centerness is read from", one_of("box", "class"))
    scale_per_level: bool = option(False, "multiply the distances of each level by a learned factor of its own")

    def build_anchors(self, strides: Sequence[int], anchors: AnchorOptions) -> Anchors:
        """The middle of every cell."""
        return points_of(strides, offset=0.5)

    def build_head(self, channels: int, anchors: Anchors) -> DenseHead:
        """With the centerness."""
        return self.head(channels, anchors, quality=self.centerness_on, delta_scale=self.scale_per_level)
