"""Deformable RoI pooling as slow loops, and regions for it."""

import math
from fractions import Fraction
from itertools import product

import torch

SCALE, GAMMA = 0.125, 0.3

# Channels: fewer than a vector, vectors and a rest, more than a thread owns at a time; samples of a cell: one, more
# than are located at a time.
REGION_SHAPES = [
    {},
    {"channels": 1, "size": (1, 1), "side": 1, "samples": 1},
    {"channels": 5, "size": (1, 9), "side": 2, "samples": 1, "moved": False},
    {"channels": 37, "size": (6, 4), "side": 2, "samples": 3},
    {"channels": 264, "batch": 1, "side": 1},
    {"channels": 16, "side": 1, "samples": 5, "count": 9},
    {"channels": 16, "side": 7, "count": 3, "moved": False},
    {"batch": 0},
    {"count": 0},
]


def make_regions(
    *,
    batch=2,
    channels=3,
    size=(9, 11),
    side=3,
    samples=2,
    count=5,
    moved=True,
    aligned=True,
    dtype=torch.float64,
    seed=0,
):
    """The raw operator's arguments: a map of stride 8, regions in and around it, some without a size, and offsets."""
    torch.manual_seed(seed)
    x = torch.randn(batch, channels, *size).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first = [
        [0, 1, 2, 30, 40],
        [1, -20, -9, 50.3, 100],
        [1, 3, 3, 4.5, 5],
        [0, 61, 62, 50, 50],
        [0, 12.5, 20, 12.5, 20],
    ]
    more = torch.rand(max(count - 5, 0), 5) * torch.tensor([2, *[8.0 * size[1], 8.0 * size[0]] * 2])
    rois = torch.cat([torch.tensor(first), more])[:count].clone().to(wide)
    offset = torch.randn(count, 2, side, side).to(wide) if moved else None
    return x, rois, offset, side, SCALE, samples, GAMMA, aligned


def along(position, size):
    """The pixels around a position along an axis, what each counts, and how fast that grows with the position."""
    moves = 0 <= position < size - 1
    position = min(max(position, Fraction(0)), Fraction(size - 1))
    for pixel in {math.floor(position), math.ceil(position)}:
        share = 1 - abs(position - pixel)
        yield pixel, float(share), (1 if pixel > position else -1) * moves
    if moves and position == math.floor(position):
        yield math.floor(position) + 1, 0.0, 1


def cells(shape, rois, offset, side, scale, samples, gamma, aligned):
    """Of each cell that may read something: its place, its image, the offset's units, its divisor, and what is read.

    Positions are computed without rounding. A pixel is a row, a column, its share, and the derivatives of that by the
    column and the row.
    """
    height, width = shape[2:]
    margin = 1 if aligned else Fraction(1, 2)
    for q, i, j in product(range(len(rois)), range(side), range(side)):
        moves = (0, 0) if offset is None else offset[q, :, i, j].tolist()
        if not all(map(math.isfinite, (*rois[q], *moves))) or not 0 <= rois[q, 0] < shape[0]:
            continue
        n, corners = int(rois[q, 0]), [Fraction(c) for c in rois[q, 1:].tolist()]
        if not aligned:
            corners = [math.floor(abs(c) + Fraction(1, 2)) * (1 if c > 0 else -1) for c in corners]
            corners = [*corners[:2], corners[2] + 1, corners[3] + 1]
        left, top, right, bottom = (c * Fraction(scale) - Fraction(1, 2) for c in corners)
        w, h = right - left, bottom - top
        if not aligned:
            w, h = max(w, Fraction(0.1)), max(h, Fraction(0.1))
        dx, dy = (Fraction(gamma) * Fraction(d) for d in moves)
        pixels, count = [], 0
        for r, s in product(range(samples), range(samples)):
            r, s = (r + Fraction(1, 2), s + Fraction(1, 2)) if aligned else (r, s)
            y = top + h * ((i + Fraction(r) / samples) / side + dy)
            x = left + w * ((j + Fraction(s) / samples) / side + dx)
            if not (-margin <= y <= height - 1 + margin and -margin <= x <= width - 1 + margin):
                continue
            count += 1
            for (row, a, da), (column, b, db) in product(along(y, height), list(along(x, width))):
                pixels.append((row, column, a * b, a * db, da * b))
        yield (q, i, j), n, (float(w) * gamma, float(h) * gamma), (samples**2 if aligned else max(count, 1)), pixels


def pooled_loop(x, rois, offset, side, *numbers):
    """A pixel of a sample of a cell at a time."""
    out = torch.zeros(len(rois), x.shape[1], side, side, dtype=torch.float64)
    for (q, i, j), n, _, divisor, pixels in cells(x.shape, rois, offset, side, *numbers):
        for row, column, share, _, _ in pixels:
            out[q, :, i, j] += x[n, :, row, column].detach().double() * share / divisor
    return out


def gradients_loop(grad, x, rois, offset, side, *numbers):
    """The gradients of the map and of the offset, in the same way."""
    x_grad = torch.zeros(x.shape, dtype=torch.float64)
    offset_grad = torch.zeros(len(rois), 2, side, side, dtype=torch.float64)
    for (q, i, j), n, units, divisor, pixels in cells(x.shape, rois, offset, side, *numbers):
        g = grad[q, :, i, j].double() / divisor
        for row, column, share, *slopes in pixels:
            x_grad[n, :, row, column] += g * share
            product_ = (g * x[n, :, row, column].detach().double()).sum()
            for axis in (0, 1):
                offset_grad[q, axis, i, j] += units[axis] * slopes[axis] * product_
    return x_grad, offset_grad
