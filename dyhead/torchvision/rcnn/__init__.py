"""Faster, Mask, Keypoint and Cascade R-CNN: torchvision's, with DyHead on the pyramid before anything reads it."""

from dyhead.torchvision.rcnn.build import FasterRCNN, build_faster_rcnn

__all__ = ["FasterRCNN", "build_faster_rcnn"]
