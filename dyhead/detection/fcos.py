"""FCOS (Tian et al., ICCV 2019 and PAMI 2021), as Detectron2 has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import CenterAssigner
from dyhead.detection.boxes import Distances
from dyhead.detection.dense_options import DenseOptions, points_of
from dyhead.detection.detector import BoxLoss, DenseDetector
from dyhead.detection.normalizer import LossNormalizer
from dyhead.detection.registry import register_detector
from dyhead.detection.scores import Score
from dyhead.options import one_of, option, part


@register_detector("FCOS")
@dataclass(frozen=True)
class FCOSOptions(DenseOptions):
    """FCOS: one point a cell, boxes as distances from it, centerness as the quality."""

    has_anchors: ClassVar[bool] = False

    assigner: CenterAssigner = part(CenterAssigner())
    box_form: Distances = part(Distances())
    box_loss: BoxLoss = part(BoxLoss(), prefix="BBOX_REG_LOSS_")
    score: Score = part(Score("root"))
    centerness_on: str = option("box", "the tower that the centerness is read from", one_of("box", "class"))
    scale_per_level: bool = option(False, "multiply the distances of each level by a learned factor of its own")

    def build(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorOptions | None = None,
        detections_per_image: int = 100,
    ) -> DenseDetector:
        """See :meth:`DenseOptions.build`."""
        return DenseDetector(
            head=self.head(
                channels,
                len(strides),
                quality=self.centerness_on,
                delta_scale=self.scale_per_level,
                box_numbers=self.box_form.per_place,
            ),
            in_features=self.in_features,
            anchors=points_of(strides, offset=0.5),
            box_form=self.box_form,
            assigner=self.assigner,
            class_loss=self.class_loss,
            score=self.score,
            normalizer=LossNormalizer(self.loss_normalizer, initial=300),
            box_loss=self.box_loss,
            inference=self.inference(detections_per_image),
            loss_names=("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"),
        )
