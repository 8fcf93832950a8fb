"""The operator of Eq. 4 of the Dynamic Head paper, level-aggregated modulated deformable sampling, for any project."""

from .backends import backend
from .flops import flop_handlers
from .functional import deform_conv2d, pyramid_deform_conv2d

__all__ = ["backend", "deform_conv2d", "flop_handlers", "pyramid_deform_conv2d"]
