"""Box forms: what the four numbers of a prediction mean, how they become a box, and what they cost.

A box form has ``per_place`` numbers a place; ``decode(numbers, anchors)`` and ``loss(numbers, anchors, boxes)``.
"""

from dyhead.detection.boxes.deltas import Deltas
from dyhead.detection.boxes.distances import Distances

__all__ = ["Deltas", "Distances"]
