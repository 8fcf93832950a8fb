import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from dyhead.detection.assigners import BACKGROUND, IGNORED, BestKeptAssigner, MaxIoUAssigner, max_iou
from tests.detection.objects import iou, make_boxes, make_places

THREE = {"sizes": [[16, 20], [32, 40], [64, 80]], "ratios": [[0.5, 1.0, 2.0]]}


def make_pyramid():
    return make_places([(12, 15), (6, 8), (3, 4)], [8, 16, 32], **THREE)


def by_loops(places, boxes, thresholds=(0.4, 0.5), labels=(0, -1, 1)):
    """RetinaNet's rules, anchor by anchor."""
    table = [[iou(anchor, box) for box in boxes.tolist()] for anchor in places.anchors.tolist()]
    largest = [max(column) for column in zip(*table, strict=True)]
    owners = []
    for row in table:
        best = max(row)
        label = labels[sum(best >= threshold for threshold in thresholds)]
        if any(value == top and value > 0 for value, top in zip(row, largest, strict=True)):
            label = 1
        owners.append({0: BACKGROUND, -1: IGNORED, 1: row.index(best)}[label])
    return owners


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_papers_rules(seed):
    places, boxes = make_pyramid(), make_boxes(9, 96, 120, seed=seed, smallest=8)
    got = MaxIoUAssigner()(places, boxes).tolist()
    assert got == by_loops(places, boxes)
    assert {BACKGROUND, IGNORED} < set(got)
    assert len(set(got)) >= 2 + 5


@pytest.mark.parametrize("seed", range(4))
def test_equals_torchvisions_matcher(seed):
    places, boxes = make_pyramid(), make_boxes(9, 96, 120, seed=10 + seed, smallest=8)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    assert MaxIoUAssigner()(places, boxes).tolist() == matcher(box_iou(boxes, places.anchors)).tolist()


@pytest.mark.parametrize(
    ("thresholds", "labels"), [((0.5,), (0, 1)), ((0.3, 0.6, 0.8), (-1, 0, -1, 1)), ((0.5,), (-1, 1))]
)
def test_thresholds_and_labels_of_ones_own(thresholds, labels):
    places, boxes = make_pyramid(), make_boxes(7, 96, 120, seed=2, smallest=8)
    got = MaxIoUAssigner(thresholds, labels)(places, boxes).tolist()
    assert got == by_loops(places, boxes, thresholds, labels)


@pytest.mark.parametrize(("share", "owner"), [(0.39, BACKGROUND), (0.41, IGNORED), (0.49, IGNORED), (0.51, 0)])
def test_the_labels_between_the_thresholds(share, owner):
    # The second anchor is the object's own best; the first covers `share` of it.
    places = make_places([(1, 2)], [8], sizes=[[8]])
    boxes = torch.tensor([[8.0, 0.0, 16.0, 8.0], [0.0, 0.0, 8.0 * share, 8.0]], dtype=torch.float64)
    assert MaxIoUAssigner()(places, boxes[:1]).tolist() == [BACKGROUND, 0]
    # An object whose best anchor is elsewhere: a third one of the exact size.
    places = places._replace(anchors=torch.cat([places.anchors, boxes[1:]]), counts=[3])
    assigned = MaxIoUAssigner()(places, boxes).tolist()
    assert assigned == [1 if owner == 0 else owner, 0, 1]


@pytest.mark.parametrize(("threshold", "owner"), [(0.5, 0), (0.5000001, BACKGROUND)])
def test_an_iou_at_the_threshold_has_the_label_above_it(threshold, owner):
    places = make_places([(1, 1)], [8], sizes=[[8]])
    places = places._replace(anchors=torch.tensor([[0.0, 0, 8, 8], [0.0, 0, 8, 4]]), counts=[2])
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0]])  # its own best is the second
    assert MaxIoUAssigner((threshold,), (0, 1))(places, boxes).tolist() == [owner, 0]


def test_every_object_has_an_anchor_and_an_anchor_the_object_of_its_own_largest_iou():
    places = make_places([(1, 1)], [8], sizes=[[8]])
    small, large = [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 8.0, 4.0]
    assert MaxIoUAssigner()(places, torch.tensor([small])).tolist() == [0]
    assert MaxIoUAssigner()(places, torch.tensor([small, large])).tolist() == [1]


def test_all_anchors_that_tie_for_an_object_are_its():
    places = make_places([(4, 4)], [8], sizes=[[16]])
    boxes = torch.tensor([[15.0, 15.0, 17.0, 17.0]], dtype=torch.float64)  # whole in four anchors
    assigned = MaxIoUAssigner()(places, boxes).view(4, 4)
    assert assigned.eq(0).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_the_first_of_equal_objects():
    places, boxes = make_pyramid(), make_boxes(1, 96, 120, smallest=30).repeat(3, 1)
    assert MaxIoUAssigner()(places, boxes).max() == 0


def test_an_object_that_overlaps_no_anchor_gets_none():
    places = make_places([(4, 4)], [16], sizes=[[4]])
    between = torch.tensor([[0.0, 0.0, 3.0, 3.0]], dtype=torch.float64)
    assert set(MaxIoUAssigner()(places, between).tolist()) == {BACKGROUND}
    beside = torch.tensor([[0.0, 0.0, 3.0, 3.0], [6.0, 6.0, 10.0, 10.0]], dtype=torch.float64)
    assert MaxIoUAssigner()(places, beside).tolist() == [1] + [BACKGROUND] * 15


@pytest.mark.parametrize(("labels", "label"), [((0, -1, 1), BACKGROUND), ((-1, 0, 1), IGNORED)])
def test_no_objects_leave_all_anchors_below_the_first_threshold(labels, label):
    got = MaxIoUAssigner(iou_labels=labels)(make_pyramid(), torch.zeros(0, 4, dtype=torch.float64))
    assert set(got.tolist()) == {label}
    assert got.dtype == torch.int64


@pytest.mark.parametrize("chunk", [1, 5000, 40000])
def test_objects_in_chunks_are_assigned_like_all_at_once(chunk, monkeypatch):
    # Whole pixels and repeated objects: ties within and across chunks.
    places, boxes = make_pyramid(), make_boxes(150, 96, 120, seed=4, smallest=4).round()
    boxes = torch.cat([boxes, boxes.flip(0)])
    together = MaxIoUAssigner()(places, boxes)
    assert together.tolist() == by_loops(places, boxes)
    monkeypatch.setattr(max_iou, "_CHUNK", chunk)
    assert torch.equal(MaxIoUAssigner()(places, boxes), together)


def test_thousands_of_objects():
    places, boxes = make_pyramid(), make_boxes(5000, 96, 120, seed=6, smallest=3)
    assigned = MaxIoUAssigner()(places, boxes)
    table = box_iou(places.anchors, boxes)
    assert torch.equal(assigned[assigned >= 0], table.argmax(dim=1)[assigned >= 0])
    assert torch.equal(assigned == BACKGROUND, (table.amax(dim=1) < 0.4) & (table < table.amax(dim=0)).all(dim=1))


def test_as_many_labels_as_intervals():
    with pytest.raises(
        ValueError, match=r"IOU_LABELS: expected 2 labels with IOU_THRESHOLDS \[0.5\], got \[0, -1, 1\]"
    ):
        MaxIoUAssigner((0.5,))


@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.5, 0.5)])
def test_thresholds_increase(thresholds):
    message = rf"IOU_THRESHOLDS: expected .*increasing.*, got \[{thresholds[0]}, {thresholds[1]}\]"
    with pytest.raises(ValueError, match=message):
        MaxIoUAssigner(thresholds)


def test_a_kept_best_anchor_is_the_objects_by_hand():
    """One anchor, 8 x 8, is the best of three objects; IoU 4 / 64 = 0.06, 32 / 64 = 0.5 and 8 / 64 = 0.125.

    It is the second one's by its own largest IoU, and the last one's where that is kept.
    """
    places = make_places([(1, 1)], [8], sizes=[[8]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 8.0, 4.0], [0.0, 0.0, 4.0, 2.0]])
    assert MaxIoUAssigner()(places, boxes).tolist() == [1]
    assert BestKeptAssigner()(places, boxes).tolist() == [2]
    assert BestKeptAssigner()(places, boxes[:2].flip(0)).tolist() == [1]


@pytest.mark.parametrize("chunk", [1, 5000, 2**24])
def test_kept_best_anchors_by_loops(chunk, monkeypatch):
    monkeypatch.setattr(max_iou, "_CHUNK", chunk)
    places, boxes = make_pyramid(), make_boxes(60, 96, 120, seed=4, smallest=4).round()
    boxes = torch.cat([boxes, boxes.flip(0)])
    want = by_loops(places, boxes)
    for i, box in enumerate(boxes.tolist()):
        overlaps = [iou(anchor, box) for anchor in places.anchors.tolist()]
        for place, overlap in enumerate(overlaps):
            if overlap == max(overlaps) > 0:
                want[place] = i
    assert BestKeptAssigner()(places, boxes).tolist() == want
    assert want != by_loops(places, boxes)


def test_an_object_that_overlaps_no_anchor_keeps_none():
    places = make_places([(4, 4)], [16], sizes=[[4]])
    between = torch.tensor([[0.0, 0.0, 3.0, 3.0]], dtype=torch.float64)
    assert set(BestKeptAssigner()(places, between).tolist()) == {BACKGROUND}
    assert set(BestKeptAssigner()(places, between[:0]).tolist()) == {BACKGROUND}
