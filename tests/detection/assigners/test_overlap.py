import pytest
import torch

from dyhead.detection.anchors import Places
from dyhead.detection.assigners import BACKGROUND, OverlapAssigner, max_iou
from tests.detection.objects import iou, make_boxes


def places_of(boxes):
    return Places(boxes, [len(boxes)], (8,))


def by_loops(coarse, boxes, threshold):
    assigned = []
    for each in coarse.tolist():
        overlaps = [iou(each, box) for box in boxes.tolist()]
        best = max(overlaps, default=0.0)
        assigned.append(overlaps.index(best) if best >= threshold else BACKGROUND)
    return assigned


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("threshold", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_by_loops(count, threshold, chunk, monkeypatch):
    monkeypatch.setattr(max_iou, "_CHUNK", chunk)  # an object at a time, or all
    boxes = make_boxes(count, 40, 60, seed=1, smallest=10)
    coarse = torch.cat([make_boxes(200, 40, 60, seed=2, smallest=10), boxes, boxes + 1])
    want = by_loops(coarse, boxes, threshold)
    assert OverlapAssigner(threshold)(places_of(coarse), boxes).tolist() == want
    assert set(range(count)) <= set(want)


def test_by_hand():
    """An object of 10 x 10: 6 of its 10 rows are an IoU of 0.6, which counts; 5.9 are too few. It gets no best box."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)
    coarse = torch.tensor([[0, 0, 10, 6], [0, 0, 10, 5.9]], dtype=torch.float64)
    assert OverlapAssigner()(places_of(coarse), boxes).tolist() == [0, BACKGROUND]
    assert OverlapAssigner()(places_of(coarse[1:]), boxes).tolist() == [BACKGROUND]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_that_are_empty_infinite_or_nan_are_no_objects(dtype):
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]], dtype=dtype)
    inf, nan = float("inf"), float("nan")
    coarse = torch.tensor(
        [[5, 5, 5, 5], [3, 3, 3, 9], [-inf, -inf, inf, inf], [nan, 0, 10, 10], [0, 0, 10, 9]], dtype=dtype
    )
    assert OverlapAssigner(0.01)(places_of(coarse), boxes).tolist() == [BACKGROUND] * 4 + [0]
