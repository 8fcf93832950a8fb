"""Assigners: which place is which object's.

An assigner is called with the places and the boxes (M, 4) of one image and returns for every place (R,) the index of
its object, :data:`BACKGROUND` or :data:`IGNORED`. Those of pairs of boxes are called with anchors or pairs, and both
boxes of the objects.
"""

from dyhead.detection.assigners.atss import ATSSAssigner
from dyhead.detection.assigners.center import CenterAssigner
from dyhead.detection.assigners.labels import BACKGROUND, IGNORED
from dyhead.detection.assigners.max_iou import BestKeptAssigner, MaxIoUAssigner
from dyhead.detection.assigners.overlap import OverlapAssigner
from dyhead.detection.assigners.paired import PairedAnchorAssigner, PairedRegionAssigner
from dyhead.detection.assigners.points import PointAssigner
from dyhead.detection.assigners.top_iou import TopIoUAssigner

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "ATSSAssigner",
    "BestKeptAssigner",
    "CenterAssigner",
    "MaxIoUAssigner",
    "OverlapAssigner",
    "PairedAnchorAssigner",
    "PairedRegionAssigner",
    "PointAssigner",
    "TopIoUAssigner",
]
