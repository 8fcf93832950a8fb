"""Dense detectors in plain tensors, without an engine: from a pyramid to losses and to detections.

A detector is put together from parts: a head (what is predicted), anchors or points (where), a box form (what the
numbers mean), an assigner (which place is which object's), a classification loss, a criterion (what all of it costs)
and a score. Both engines run the same detectors through thin adapters; a detector is one file here.

Shapes in this package: N images, M objects of an image, R places (anchors of all cells of all levels), A anchors of a
cell, K classes, P positive places. Boxes are (x0, y0, x1, y1) in pixels of the image as the network sees it. Places run
from the finest level to the coarsest, row by row, cell by cell, anchor by anchor.
"""

# Importing a detector registers it.
from dyhead.detection import (
    atss,
    autoassign,
    borderdet,
    fcos,
    gfl,
    noisy_anchors,
    paired_box,
    reppoints,
    retinanet,
    saccadenet,
)
from dyhead.detection.anchors import Anchors, Places
from dyhead.detection.detector import DenseDetector, Detections, Predictions, Targets
from dyhead.detection.heads import DenseHead
from dyhead.detection.registry import DETECTORS, Registered, register_detector
from dyhead.detection.visible_nms import r2nms

__all__ = [
    "DETECTORS",
    "Anchors",
    "DenseDetector",
    "DenseHead",
    "Detections",
    "Places",
    "Predictions",
    "Registered",
    "Targets",
    "atss",
    "autoassign",
    "borderdet",
    "fcos",
    "gfl",
    "noisy_anchors",
    "paired_box",
    "r2nms",
    "register_detector",
    "reppoints",
    "retinanet",
    "saccadenet",
]
