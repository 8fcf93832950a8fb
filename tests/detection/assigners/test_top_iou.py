import pytest
import torch

from dyhead.detection.assigners import BACKGROUND, TopIoUAssigner, max_iou
from tests.detection.objects import iou, make_boxes, make_places


def make_pyramid():
    sizes = [[16, 20], [32, 40], [64, 80]]
    places = make_places([(12, 15), (6, 8), (3, 4)], [8, 16, 32], sizes=sizes, ratios=[[0.5, 1.0, 2.0]])
    torch.manual_seed(0)
    return places._replace(anchors=places.anchors + torch.rand_like(places.anchors))  # none ties with another


def by_loops(places, boxes, top):
    """The rules, anchor by anchor."""
    table = [[iou(anchor, box) for box in boxes.tolist()] for anchor in places.anchors.tolist()]
    wanted = set()
    for column in zip(*table, strict=True):
        ranked = sorted(range(len(column)), key=lambda place: -column[place])[:top]
        wanted |= {place for place in ranked if column[place] > 0}
    return [row.index(max(row)) if place in wanted else BACKGROUND for place, row in enumerate(table)]


@pytest.mark.parametrize("top", [1, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_rules_by_loops(seed, top):
    places, boxes = make_pyramid(), make_boxes(6, 96, 120, seed=seed, smallest=20)
    got = TopIoUAssigner(top)(places, boxes).tolist()
    assert got == by_loops(places, boxes, top)
    assert len(set(got)) > 2


@pytest.mark.parametrize("step", [1, 4])
def test_objects_in_parts(step, monkeypatch):
    places, boxes = make_pyramid(), make_boxes(6, 96, 120, seed=1, smallest=20)
    whole = TopIoUAssigner()(places, boxes)
    monkeypatch.setattr(max_iou, "_CHUNK", step * len(places.anchors))
    assert torch.equal(TopIoUAssigner()(places, boxes), whole)


def test_an_anchor_belongs_to_the_object_of_its_own_largest_iou():
    # Both objects want the one anchor, the first by an IoU of 1/2, the second by 3/4.
    places = make_places([(1, 1)], [8], sizes=[[8]])
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0], [0.0, 0.0, 8.0, 6.0]], dtype=torch.float64)
    assert TopIoUAssigner()(places, boxes).tolist() == [1]


def test_an_object_that_overlaps_no_anchor_has_none():
    places = make_places([(2, 2)], [8], sizes=[[8]])
    boxes = torch.tensor([[100.0, 100.0, 120.0, 120.0], [1.0, 1.0, 8.0, 8.0]], dtype=torch.float64)
    assert TopIoUAssigner()(places, boxes).tolist() == [1, BACKGROUND, BACKGROUND, BACKGROUND]


def test_without_objects_all_is_background():
    places = make_places([(2, 2)], [8])
    assert TopIoUAssigner()(places, torch.zeros(0, 4, dtype=torch.float64)).tolist() == [BACKGROUND] * 4
