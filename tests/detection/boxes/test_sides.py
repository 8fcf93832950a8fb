"""Distances to the sides of boxes, and boxes from them."""

import torch

from dyhead.detection.boxes.sides import around, side_units, sides_of


def test_by_hand():
    anchors = torch.tensor([[0.0, 0, 8, 4], [10, 20, 12, 20]])  # centers (4, 2) and (11, 20)
    sides = torch.tensor([[1.0, 2, 3, 4], [-1, 0, 5, 0.5]])
    assert around(anchors, sides).tolist() == [[3, 0, 7, 6], [12, 20, 16, 20.5]]
    assert side_units(anchors).tolist() == [[8, 4, 8, 4], [2, 0, 2, 0]]


def test_every_point_and_box():
    points, boxes = torch.tensor([[4.0, 2], [11, 20], [0, 0]]), torch.tensor([[3.0, 0, 7, 6], [12, 20, 16, 20.5]])
    expected = [[[x - x0, y - y0, x1 - x, y1 - y] for x0, y0, x1, y1 in boxes.tolist()] for x, y in points.tolist()]
    assert sides_of(boxes, points[:, None]).tolist() == expected
