"""Box forms: what the numbers of a prediction mean, how they become a box, and what they cost.

A box form has ``per_place`` numbers a place; ``decode(numbers, anchors)`` and ``loss(numbers, anchors, boxes)``. One
that learns something is a module. ``DeltaPairs`` has two boxes, and two costs; ``Centers`` has ``costs`` instead of the
latter.
"""

from dyhead.detection.boxes.borders import Borders
from dyhead.detection.boxes.centers import Centers
from dyhead.detection.boxes.deltas import Deltas
from dyhead.detection.boxes.distances import Distances
from dyhead.detection.boxes.distribution import Distribution
from dyhead.detection.boxes.pairs import DeltaPairs
from dyhead.detection.boxes.points import Points

__all__ = ["Borders", "Centers", "DeltaPairs", "Deltas", "Distances", "Distribution", "Points"]
