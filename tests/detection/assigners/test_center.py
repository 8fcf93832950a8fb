import pytest
import torch

from dyhead.detection.assigners import BACKGROUND, CenterAssigner
from tests.detection.objects import make_boxes, make_places

FOUR = [(12, 15), (6, 8), (3, 4), (1, 1)], [8, 16, 32, 64]


def by_loops(places, boxes, radius, closed):
    """FCOS's rules: inside, near the center, the level for the size; the smallest object."""
    owners = []
    levels = [level for level, count in enumerate(places.counts) for _ in range(count)]
    for level, anchor in zip(levels, places.anchors.tolist(), strict=True):
        stride, last = places.strides[level], level == len(places.strides) - 1
        low = 0 if level == 0 else 4 * stride
        high = float("inf") if last else 8 * stride
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        wanted = []
        for m, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            if not (x0 < x < x1 and y0 < y < y1):
                continue
            if radius and max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) >= radius * stride:
                continue
            farthest = max(x - x0, y - y0, x1 - x, y1 - y)
            if low <= farthest <= high if closed else low < farthest < high:
                wanted.append(((x1 - x0) * (y1 - y0), m))
        owners.append(min(wanted)[1] if wanted else BACKGROUND)
    return owners


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("radius", [0, 1.5, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_papers_rules(seed, radius, closed):
    places = make_places(*FOUR)
    # Whole pixels: distances then meet the ends of the ranges.
    boxes = make_boxes(12, 96, 120, seed=seed, smallest=2).round()
    got = CenterAssigner(radius, closed)(places, boxes).tolist()
    assert got == by_loops(places, boxes, radius, closed)
    assert max(got) >= 0


@pytest.mark.parametrize(("closed", "levels"), [(False, set()), (True, {0, 1})])
def test_a_size_at_the_end_of_two_ranges(closed, levels):
    # A point of both levels at 56, 56, and an object whose farthest side is 64 = 8 * 8 = 4 * 16 pixels from it.
    places = make_places([(16, 16), (8, 8)], [8, 16], offset=0.0)
    boxes = torch.tensor([[0.0, 0.0, 96.0, 128.0]], dtype=torch.float64)
    assigned = CenterAssigner(0, closed)(places, boxes)
    fine, coarse = assigned[: 16 * 16].view(16, 16), assigned[16 * 16 :].view(8, 8)
    at = {level for level, grid, cell in ((0, fine, 8), (1, coarse, 4)) if grid[cell, cell - cell // 4] == 0}
    assert at == levels


def test_a_point_on_the_border_is_outside():
    places = make_places([(1, 2)], [8])  # centers 4, 4 and 12, 4
    boxes = torch.tensor([[4.0, 0.0, 16.0, 8.0]], dtype=torch.float64)
    assert CenterAssigner(0)(places, boxes).tolist() == [BACKGROUND, 0]


def test_a_point_at_the_radius_is_too_far():
    places = make_places([(1, 5)], [8], offset=0.0)  # x = 0, 8, 16, 24, 32
    boxes = torch.tensor([[-40.0, -30.0, 72.0, 30.0]], dtype=torch.float64)  # center 16, 0
    assert CenterAssigner(1.0)(places, boxes).tolist() == [-1, -1, 0, -1, -1]
    assert CenterAssigner(1.01)(places, boxes).tolist() == [-1, 0, 0, 0, -1]


def test_the_smallest_of_several_and_the_first_of_equal_ones():
    places = make_places([(1, 1)], [8])
    boxes = [[0.0, 0, 8, 8], [1.0, 1, 7, 7], [1.0, 1, 7, 7], [0.5, 0.5, 7.5, 7.5]]
    assert CenterAssigner()(places, torch.tensor(boxes)).tolist() == [1]


def test_an_object_smaller_than_a_cell():
    places = make_places([(4, 4), (2, 2)], [8, 16])
    around, beside = [11.0, 11.0, 13.0, 13.0], [14.0, 14.0, 17.0, 17.0]  # the point 12, 12
    assigned = CenterAssigner()(places, torch.tensor([beside, around], dtype=torch.float64))
    assert assigned.nonzero().flatten().tolist() != []
    assert assigned[5] == 1
    assert (assigned == BACKGROUND).sum() == 19


def test_no_objects_leave_all_places_to_the_background():
    got = CenterAssigner()(make_places([(3, 3), (1, 1)], [8, 16]), torch.zeros(0, 4, dtype=torch.float64))
    assert got.tolist() == [BACKGROUND] * 10
    assert got.dtype == torch.int64


def test_a_single_level_is_for_all_sizes():
    places = make_places([(20, 20)], [8])
    boxes = torch.tensor([[3.0, 3.0, 5.0, 5.0], [10.0, 0.0, 160.0, 160.0]], dtype=torch.float64)
    got = CenterAssigner(0)(places, boxes).tolist()
    assert got == by_loops(places, boxes, 0, False)
    assert set(got) == {BACKGROUND, 0, 1}


def test_thousands_of_objects():
    places = make_places([(16, 16), (8, 8)], [8, 16])
    boxes = make_boxes(2000, 128, 128, seed=3)
    assert CenterAssigner()(places, boxes).tolist() == by_loops(places, boxes, 1.5, False)
