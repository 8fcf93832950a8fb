"""Border alignment as slow loops, and boxes for it."""

import math

import numpy as np
import torch

# Channels of a border: fewer than a vector, vectors and a rest, more than are taken at a time; points: two, more than
# are located at a time.
BORDER_SHAPES = [
    {},
    {"channels": 1, "size": (1, 1), "grid": (1, 1)},
    {"channels": 1, "size": (1, 9), "grid": (2, 7), "pool_size": 1},
    {"channels": 37, "size": (6, 4), "grid": (7, 5), "pool_size": 4},
    {"channels": 264, "size": (4, 5), "grid": (3, 1), "batch": 1},
    {"channels": 16, "size": (3, 40), "grid": (5, 8), "pool_size": 255},
    {"batch": 0},
    {"grid": (0, 3)},
]


def make_borders(*, batch=2, channels=3, size=(5, 7), grid=(3, 4), pool_size=10, dtype=torch.float64, seed=0):
    """A map with `channels` channels a border, boxes around it, some of them beyond its edge, and a pool size."""
    torch.manual_seed(seed)
    x = torch.randn(batch, 4 * channels, *size).to(dtype)
    limits = torch.tensor([size[1], size[0], size[1], size[0]]).view(1, 4, 1, 1)
    boxes = (torch.rand(batch, 4, *grid) * 1.6 - 0.3) * limits
    return x, boxes.to(torch.float64 if dtype == torch.float64 else torch.float32), pool_size


def corners(size, y, x):
    """The pixels around a position inside a map of `size`, and what each counts; none for one that is no number."""
    if not (math.isfinite(y) and math.isfinite(x)):
        return
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < size[0] and 0 <= column < size[1]:
                yield row, column, (1 - abs(y - row)) * (1 - abs(x - column))


def point(box, border, k, pool_size):
    """Point k of a border as y, x, in the precision of the box, which is an array."""
    x1, y1, x2, y2 = box
    with np.errstate(all="ignore"):
        across, down = (x2 - x1) / pool_size, (y2 - y1) / pool_size
        y, x = [(y1, x1 + k * across), (y1 + k * down, x1), (y2, x2 - k * across), (y2 - k * down, x2)][border]
    return float(y), float(x)


def outputs(x, boxes):
    """Image, channel, cell and border of every output, and its box."""
    batch, channels = x.shape[:2]
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, (batch, channels, *boxes.shape[2:]))).tolist():
        yield (n, c, i, j), c // (channels // 4), boxes[n, :, i, j].numpy()


def maxima_loop(x, boxes, pool_size):
    """Maxima, and which point has each, the first of several."""
    values = torch.empty(*x.shape[:2], *boxes.shape[2:], dtype=torch.float64)
    index = torch.empty(values.shape, dtype=torch.uint8)
    for at, border, box in outputs(x, boxes):
        plane = x[at[0], at[1]].tolist()
        samples = [
            sum((share * plane[i][j] for i, j, share in corners(x.shape[2:], *point(box, border, k, pool_size))), 0.0)
            for k in range(pool_size + 1)
        ]
        values[at] = max(samples)
        index[at] = samples.index(max(samples))
    return values, index


def gradient_loop(grad, x, boxes, index, pool_size):
    """The gradient of x, from which point has each maximum."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for at, border, box in outputs(x, boxes):
        for i, j, share in corners(x.shape[2:], *point(box, border, index[at].item(), pool_size)):
            result[at[0], at[1], i, j] += share * grad[at].item()
    return result


def put_far(boxes):
    """Boxes with a third of their coordinates far away, infinite or no number.

    Powers of two: with a pool size that is one, points are the same whether or not a product is rounded before a sum.
    """
    far = [math.nan, math.inf, -math.inf, 2.0**100, -(2.0**100), 2.0**31, -(2.0**31), 2.0**63, -(2.0**62), 2.0**20]
    many = torch.tensor(far, dtype=boxes.dtype).repeat(boxes.numel())[: boxes.numel()].view(boxes.shape)
    return torch.where(torch.rand(boxes.shape) < 0.3, many, boxes)
