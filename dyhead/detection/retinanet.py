"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017), as Detectron2 has it."""

from __future__ import annotations

from dataclasses import dataclass

from dyhead.detection.assigners import MaxIoUAssigner
from dyhead.detection.boxes import Deltas
from dyhead.detection.dense_options import DenseOptions
from dyhead.detection.registry import register_detector
from dyhead.options import inherited, part


@register_detector("RetinaNet")
@dataclass(frozen=True)
class RetinaNetOptions(DenseOptions):
    """RetinaNet: anchors of several sizes and shapes a cell, boxes as deltas from them, no quality."""

    num_convs: int = inherited(DenseOptions, "num_convs", 4)
    nms_thresh_test: float = inherited(DenseOptions, "nms_thresh_test", 0.5)
    assigner: MaxIoUAssigner = part(MaxIoUAssigner())
    box_form: Deltas = part(Deltas())
