import math

import pytest
import torch

from dyhead.detection.assigners import BACKGROUND, PointAssigner
from tests.detection.objects import make_boxes, make_places

SHAPES, STRIDES = [(12, 15), (6, 8), (3, 4), (1, 1)], [8, 16, 32, 64]


def places_of(shapes=SHAPES, strides=STRIDES, dtype=torch.float64):
    return make_places(shapes, strides, offset=0.0, dtype=dtype)


def by_loops(places, boxes, scale=4.0):
    owner, nearest, first = [BACKGROUND] * sum(places.counts), [math.inf] * sum(places.counts), [0]
    for count in places.counts:
        first.append(first[-1] + count)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        size = math.sqrt((x1 - x0) * (y1 - y0)) / scale
        fitting = [level for level, stride in enumerate(places.strides) if stride <= size]
        level = max(fitting, default=0)
        best = (math.inf, None)
        for place in range(first[level], first[level + 1]):
            x, y = places.centers[place].tolist()
            away = math.hypot((x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0))
            if away < best[0]:
                best = (away, place)
        away, place = best
        if away < nearest[place]:
            owner[place], nearest[place] = i, away
    return owner


def test_by_hand():
    """Places are at multiples of 8 on 15 columns, then from 180 on at multiples of 16 on 8 columns, and so on.

    0: 40 x 26, sqrt(1040) / 4 = 8.1: the first level. Its center 29, 34 is nearest to 32, 32: row 4, column 4.
    1: 64 x 64, 64 / 4 = 16: the second level. Center 70, 46: 64, 48: row 3, column 4 of 8.
    2: 3 x 2, smaller than a cell: the first level. Center 101.5, 90: 104, 88: row 11, column 13.
    3: 400 x 300, sqrt(120000) / 4 = 86.6: beyond the last level, which has one place.
    4: at the border; center 1, 60, 2 x 120, sqrt(240) / 4 = 3.9. In its own units 0, 56 and 0, 64 are equally near, at
       sqrt(0.5**2 + (4 / 120)**2): the first one, row 7.
    """
    boxes = [[9, 21, 49, 47], [38, 14, 102, 78], [100, 89, 103, 91], [-190, -100, 210, 200], [0, 0, 2, 120]]
    got = PointAssigner()(places_of(), torch.tensor(boxes, dtype=torch.float64))
    positive = {place: owner for place, owner in enumerate(got.tolist()) if owner >= 0}
    assert positive == {4 * 15 + 4: 0, 180 + 3 * 8 + 4: 1, 11 * 15 + 13: 2, 180 + 48 + 12: 3, 7 * 15: 4}


def test_of_two_objects_the_nearer_has_the_point():
    """Both centers, 17, 18 and 18, 17.5, are nearest to 16, 16.

    0 is 4 x 4: sqrt((1 / 4)**2 + (2 / 4)**2) = 0.56. 1 is 20 x 20: sqrt((2 / 20)**2 + (1.5 / 20)**2) = 0.125.
    """
    boxes = torch.tensor([[15, 16, 19, 20], [8, 7.5, 28, 27.5]], dtype=torch.float64)
    for order in ([0, 1], [1, 0]):
        got = PointAssigner()(places_of(), boxes[order])
        assert got[2 * 15 + 2] == order.index(1)
        assert (got >= 0).sum() == 1  # the other object has none
    assert PointAssigner()(places_of(), boxes[[1, 1]])[2 * 15 + 2] == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [4.0, 1.5])
def test_by_loops(seed, scale):
    boxes = make_boxes(40, 96, 120, seed=seed, smallest=2)
    got = PointAssigner(scale)(places_of(), boxes)
    assert got.tolist() == by_loops(places_of(), boxes, scale)
    assert (got >= 0).sum() > 15


@pytest.mark.parametrize(("side", "level"), [(31.9, 0), (63.9, 0), (64, 1), (127.9, 1), (128, 2), (256, 3), (9999, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_begin_at_four_strides(side, level, dtype):
    places = places_of(dtype=dtype)
    assigned = PointAssigner()(places, torch.tensor([[1, 2, 1 + side, 2 + side]], dtype=dtype))
    assert places.by_level(range(4))[assigned >= 0].tolist() == [level]


def test_levels_of_one_place():
    places = places_of([(1, 1), (1, 1)], [8, 16])
    assert PointAssigner()(places, make_boxes(1, 32, 32)).tolist().count(0) == 1


def test_no_objects():
    assert set(PointAssigner()(places_of(), torch.zeros(0, 4)).tolist()) == {BACKGROUND}


def test_an_object_without_extent_has_a_point():
    got = PointAssigner()(places_of(), torch.tensor([[16.0, 24.0, 16.0, 24.0]]))
    assert got[3 * 15 + 2] == 0
