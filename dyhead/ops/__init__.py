"""Operators for any project: level-aggregated modulated deformable sampling, Eq. 4 of the Dynamic Head paper,
border alignment, and deformable RoI pooling."""

from .backends import backend
from .border import border_align
from .flops import flop_handlers
from .functional import deform_conv2d, pyramid_deform_conv2d
from .regions import deform_roi_pool

__all__ = ["backend", "border_align", "deform_conv2d", "deform_roi_pool", "flop_handlers", "pyramid_deform_conv2d"]
