"""Places and objects of images that were never taken."""

import math

import torch

from dyhead.detection import DETECTORS
from dyhead.detection.anchors import Anchors
from dyhead.options import leaves


def make_places(shapes, strides, *, sizes=None, ratios=((1.0,),), offset=0.5, dtype=torch.float64):
    """Anchors of these levels: squares of 4 strides unless ``sizes`` says otherwise."""
    sizes = [[4 * stride] for stride in strides] if sizes is None else sizes
    return Anchors(sizes, ratios, strides, offset)(shapes, dtype=dtype, device=torch.device("cpu"))


def levels_of(name, levels):
    """Those of the levels that a registered detector can predict on, all or the finest alone."""
    (leaf,) = (leaf for leaf in leaves(DETECTORS[name].options) if leaf.key == "IN_FEATURES")
    return tuple(levels) if leaf.expected(tuple(levels)) is None else tuple(levels)[:1]


def make_boxes(count, height, width, *, seed=0, smallest=1.0, dtype=torch.float64):
    """Boxes (M, 4) inside an image, of all sizes from ``smallest`` to the image's."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=dtype)
    share = torch.rand(count, 2, generator=generator, dtype=dtype) ** 2
    wide = smallest + share * (size - smallest)
    low = torch.rand(count, 2, generator=generator, dtype=dtype) * (size - wide)
    return torch.cat([low, low + wide], dim=1)


def read_at(x, y, image):
    """A map (C, H, W) between its pixels, 0 beyond them."""
    total = 0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * image[:, i, j]
    return total


def iou(a, b):
    """Of two boxes, each four numbers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
