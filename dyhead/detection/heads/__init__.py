"""Heads: what turns pyramid levels into the numbers of every place."""

from dyhead.detection.heads.border import BorderHead
from dyhead.detection.heads.centers import CenterHead
from dyhead.detection.heads.dense import DenseHead
from dyhead.detection.heads.points import PointHead

__all__ = ["BorderHead", "CenterHead", "DenseHead", "PointHead"]
