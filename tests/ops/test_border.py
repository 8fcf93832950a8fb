"""Border alignment against a slow loop."""

import math

import pytest
import torch

from dyhead.ops import border_align


def read(plane, y, x):
    """A plane (H, W) at a position, bilinear and 0 outside; nothing is read at a position that is no number."""
    if not (math.isfinite(y) and math.isfinite(x)):
        return 0.0
    height, width = plane.shape
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column].item()
    return total


def loop(x, boxes, pool_size):
    """Border alignment as its formula says."""
    batch, channels, _, _ = x.shape
    result = torch.empty(batch, channels, *boxes.shape[2:], dtype=torch.float64)
    for n, i, j in torch.cartesian_prod(*map(torch.arange, (batch, *boxes.shape[2:]))).tolist():
        x1, y1, x2, y2 = boxes[n, :, i, j].tolist()
        for channel in range(channels):
            across, down = (x2 - x1) / pool_size, (y2 - y1) / pool_size
            points = [
                [(y1, x1 + k * across) for k in range(pool_size + 1)],
                [(y1 + k * down, x1) for k in range(pool_size + 1)],
                [(y2, x2 - k * across) for k in range(pool_size + 1)],
                [(y2 - k * down, x2) for k in range(pool_size + 1)],
            ][channel // (channels // 4)]
            result[n, channel, i, j] = max(read(x[n, channel], *point) for point in points)
    return result


def make_boxes(batch, grid, size, seed=0):
    """Boxes (batch, 4, *grid) around a map of `size`, some of them beyond its edge, in float64."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float64).view(1, 4, 1, 1)
    return (torch.rand(batch, 4, *grid, dtype=torch.float64, generator=generator) * 1.6 - 0.3) * limits


@pytest.mark.parametrize("pool_size", [1, 4, 10])
def test_maxima_are_those_of_a_loop(pool_size):
    torch.manual_seed(0)
    x, boxes = torch.randn(2, 12, 5, 7, dtype=torch.float64), make_boxes(2, (3, 4), (5, 7))
    torch.testing.assert_close(border_align(x, boxes, pool_size), loop(x, boxes, pool_size))
