import statistics

import pytest
import torch

from dyhead.detection.assigners import BACKGROUND, ATSSAssigner
from tests.detection.objects import iou, make_boxes, make_places


def by_loops(places, boxes, candidates, per_cell=1):
    """Algorithm 1 of the paper, object by object."""
    anchors = places.anchors.tolist()
    owner, best = [BACKGROUND] * len(anchors), [-1.0] * len(anchors)
    for m, box in enumerate(boxes.tolist()):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        chosen, first = [], 0
        for count in places.counts:
            level = range(first, first + count)
            centers = {r: ((anchors[r][0] + anchors[r][2]) / 2, (anchors[r][1] + anchors[r][3]) / 2) for r in level}
            away = {r: (x - middle[0]) ** 2 + (y - middle[1]) ** 2 for r, (x, y) in centers.items()}
            chosen += sorted(level, key=away.get)[: candidates * per_cell]
            first += count
        overlaps = {r: iou(anchors[r], box) for r in chosen}
        threshold = statistics.mean(overlaps.values())
        threshold += statistics.stdev(overlaps.values()) if len(chosen) > 1 else 0
        for r, overlap in overlaps.items():
            x, y = (anchors[r][0] + anchors[r][2]) / 2, (anchors[r][1] + anchors[r][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best[r]:
                owner[r], best[r] = m, overlap
    return owner


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("candidates", [1, 4, 9])
def test_equals_the_papers_algorithm(seed, candidates):
    places = make_places([(12, 15), (6, 8), (3, 4), (1, 1)], [8, 16, 32, 64])
    boxes = make_boxes(12, 96, 120, seed=seed)
    got = ATSSAssigner(candidates)(places, boxes).tolist()
    assert got == by_loops(places, boxes, candidates)
    assert max(got) >= 0


def test_candidates_are_counted_per_anchor_of_a_cell():
    # Off the grid's symmetries: anchors of a cell are equally far, so that only whole cells are chosen.
    places = make_places([(9, 9), (5, 5)], [8, 16], sizes=[[20, 30], [40, 60]], ratios=[[0.5, 1.0, 2.0]])
    assert places.per_cell == 6
    boxes = make_boxes(6, 72, 72, seed=5, smallest=9)
    got = ATSSAssigner(3)(places, boxes).tolist()
    assert got == by_loops(places, boxes, 3, per_cell=6)
    assert got != by_loops(places, boxes, 3)


def test_no_objects_leave_all_places_to_the_background():
    places = make_places([(3, 3), (1, 1)], [8, 16])
    got = ATSSAssigner()(places, torch.zeros(0, 4, dtype=torch.float64))
    assert got.tolist() == [BACKGROUND] * 10
    assert got.dtype == torch.int64


def test_the_only_candidate_is_the_objects():
    places = make_places([(1, 1)], [8])  # center at 4, 4
    boxes = torch.tensor([[1.0, 2.0, 7.0, 5.0]], dtype=torch.float64)
    assert ATSSAssigner()(places, boxes).tolist() == [0]


def test_the_only_candidate_lies_outside():
    places = make_places([(1, 1)], [8])
    boxes = torch.tensor([[5.0, 5.0, 9.0, 9.0]], dtype=torch.float64)
    assert ATSSAssigner()(places, boxes).tolist() == [BACKGROUND]


@pytest.mark.parametrize(("border", "owner"), [(3.98, 0), (3.995, BACKGROUND)])
def test_a_center_lies_inside_by_more_than_a_hundredth_of_a_pixel(border, owner):
    places = make_places([(1, 1)], [8])
    assert ATSSAssigner()(places, torch.tensor([[border, 0.0, 8.0, 8.0]], dtype=torch.float64)).tolist() == [owner]


def test_an_object_between_all_centers_gets_nothing():
    places = make_places([(4, 4)], [8])  # centers at 4, 12, 20, 28
    boxes = torch.tensor([[6.0, 6.0, 10.0, 10.0]], dtype=torch.float64)
    assert set(ATSSAssigner()(places, boxes).tolist()) == {BACKGROUND}


def test_an_object_at_the_border_of_the_image():
    places = make_places([(6, 6)], [8])
    boxes = torch.tensor([[17.0, 0.0, 48.0, 20.0], [0.0, 40.0, 9.0, 48.0]], dtype=torch.float64)
    got = ATSSAssigner()(places, boxes).tolist()
    assert got == by_loops(places, boxes, 9)
    assert {0, 1} <= set(got)


def test_two_equal_objects_are_the_firsts():
    places = make_places([(6, 6)], [8])
    boxes = torch.tensor([[5.0, 7.0, 30.0, 33.0]] * 2, dtype=torch.float64)
    assert set(ATSSAssigner()(places, boxes).tolist()) == {0, BACKGROUND}


def test_thousands_of_objects():
    places = make_places([(16, 16), (8, 8), (4, 4)], [8, 16, 32])
    boxes = make_boxes(3000, 128, 128, seed=1)
    together = ATSSAssigner(3)(places, boxes)
    # Of two groups each place goes to the one that overlaps it more.
    parts = [ATSSAssigner(3)(places, part) for part in boxes.split(1500)]
    anchors = places.anchors.tolist()
    for r in range(0, len(anchors), 7):
        wanted = [1500 * k + part[r].item() for k, part in enumerate(parts) if part[r] >= 0]
        want = max(wanted, key=lambda m, r=r: iou(anchors[r], boxes[m].tolist()), default=BACKGROUND)
        assert together[r].item() == want
