"""What two-stage detectors do with regions of interest, in plain tensors: box heads by name, masks, keypoints.

``MODEL.ROI_BOX_HEAD.NAME`` chooses the box head; proposals, sampling and box losses are the engine's. Shapes: Q regions
of all images, C channels, S side of a pooled region in cells, K classes, J keypoints of an object.
"""

from dyhead.detection.roi import task_aware  # registers it
from dyhead.detection.roi.registry import BOX_HEADS, Registered, register_box_head
from dyhead.detection.roi.task_aware import DyHeadBoxHead

__all__ = ["BOX_HEADS", "DyHeadBoxHead", "Registered", "register_box_head", "task_aware"]
