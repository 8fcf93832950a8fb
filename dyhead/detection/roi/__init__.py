"""What two-stage detectors do with regions of interest, in plain tensors: box heads by name, masks, keypoints.

``MODEL.ROI_BOX_HEAD.NAME`` chooses the box head; proposals, sampling and box losses are the engine's. Shapes: Q regions
of all images, C channels, S side of a pooled region in cells, K classes, J keypoints of an object.
"""

from dyhead.detection.roi import d2det, double_head, dually_supervised, hit_detector, task_aware  # registers them
from dyhead.detection.roi.d2det import D2DetHead
from dyhead.detection.roi.double_head import DoubleHead
from dyhead.detection.roi.dually_supervised import DecoupledBoxHead, DuallySupervisedOptions, Tap
from dyhead.detection.roi.hit_detector import HitDetectorHead
from dyhead.detection.roi.registry import BOX_HEADS, Registered, register_box_head
from dyhead.detection.roi.task_aware import DyHeadBoxHead

__all__ = [
    "BOX_HEADS",
    "D2DetHead",
    "DecoupledBoxHead",
    "DoubleHead",
    "DuallySupervisedOptions",
    "DyHeadBoxHead",
    "HitDetectorHead",
    "Registered",
    "Tap",
    "d2det",
    "double_head",
    "dually_supervised",
    "hit_detector",
    "register_box_head",
    "task_aware",
]
