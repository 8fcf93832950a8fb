"""Heads: what turns pyramid levels into the numbers of every place."""

from dyhead.detection.heads.dense import DenseHead

__all__ = ["DenseHead"]
