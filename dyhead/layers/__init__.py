"""Dynamic Head as PyTorch modules: the attentions of Eqs. 3 to 5, the block, the stack; other necks and convolutions.

Shapes in this package: N batch, C channels, L levels; level l is (N, C, H_l, W_l), levels run from fine to coarse, each
half the size of the previous one unless a module says otherwise. K taps of a kernel, G offset groups.
"""

from dyhead.layers.adapters import PyramidAdapter
from dyhead.layers.block import DyHeadBlock
from dyhead.layers.deform_conv import DeformConv2d, DeformConv2dPack
from dyhead.layers.fpt import FPT
from dyhead.layers.head import DyHead
from dyhead.layers.mmcv import ModulatedDeformConv2d
from dyhead.layers.pconv import PConv, SampledPConv
from dyhead.layers.psconv import PSConv2d
from dyhead.layers.pyconv import PyConv2d
from dyhead.layers.released import ReleasedDyHeadBlock
from dyhead.layers.scale_attention import ScaleAwareAttention
from dyhead.layers.sepc import SEPC, TaskLevel
from dyhead.layers.spatial_attention import SpatialAwareAttention
from dyhead.layers.task_attention import TaskAwareAttention
from dyhead.layers.top import P6P7
from dyhead.layers.vision_language import VisionLanguageDyHead

__all__ = [
    "FPT",
    "P6P7",
    "SEPC",
    "DeformConv2d",
    "DeformConv2dPack",
    "DyHead",
    "DyHeadBlock",
    "ModulatedDeformConv2d",
    "PConv",
    "PSConv2d",
    "PyConv2d",
    "PyramidAdapter",
    "ReleasedDyHeadBlock",
    "SampledPConv",
    "ScaleAwareAttention",
    "SpatialAwareAttention",
    "TaskAwareAttention",
    "TaskLevel",
    "VisionLanguageDyHead",
]
