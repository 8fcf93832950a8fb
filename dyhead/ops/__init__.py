"""Operators for any project: level-aggregated modulated deformable sampling, Eq. 4 of the Dynamic Head paper, and
border alignment."""

from .backends import backend
from .border import border_align
from .flops import flop_handlers
from .functional import deform_conv2d, pyramid_deform_conv2d

__all__ = ["backend", "border_align", "deform_conv2d", "flop_handlers", "pyramid_deform_conv2d"]
