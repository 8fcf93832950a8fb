import pytest
import torch

from dyhead.detection import Predictions, Targets
from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import ATSSAssigner
from dyhead.detection.gfl import GFLOptions
from tests.detection.objects import make_boxes

STRIDES, SHAPES = (8, 16), [(8, 10), (4, 5)]
PLACES = sum(h * w for h, w in SHAPES)


def make_detector(anchors=None, **options):
    return GFLOptions(num_classes=3, in_features=("p3", "p4"), **options).build(4, STRIDES, anchors=anchors)


def make_predictions(logits=None, numbers=None):
    logits = torch.zeros(1, PLACES, 3, dtype=torch.float64) if logits is None else logits
    numbers = torch.zeros(1, PLACES, 68, dtype=torch.float64) if numbers is None else numbers
    return Predictions(logits, numbers, None, SHAPES)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [((64,), (128,)), ((24,), (100,))])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_the_assigner_sees_the_configured_anchors(offset, sizes, ratio):
    detector = make_detector(AnchorOptions(sizes, ((ratio,),), offset))
    boxes = make_boxes(8, 64, 80, smallest=10)
    targets = [Targets(boxes, torch.zeros(8, dtype=torch.int64))]
    got = detector.assign(detector.places(make_predictions()), targets)[0]
    grid = Anchors(sizes, ((ratio,),), STRIDES, offset)
    want = ATSSAssigner()(grid(SHAPES, dtype=torch.float64, device=torch.device("cpu")), boxes)
    assert torch.equal(got, want)
    assert (want >= 0).sum() > 3


def test_without_anchors_they_are_squares_of_8_strides_around_the_corners_of_cells():
    boxes = make_boxes(8, 64, 80, smallest=10)
    targets = [Targets(boxes, torch.zeros(8, dtype=torch.int64))]
    given = make_detector(AnchorOptions(((64,), (128,)), ((1.0,),), 0.0))
    want = given.assign(given.places(make_predictions()), targets)
    detector = make_detector()
    assert torch.equal(detector.assign(detector.places(make_predictions()), targets), want)


@pytest.mark.parametrize(
    "anchors", [AnchorOptions(((64, 80), (128, 160)), ((1.0,),)), AnchorOptions(((64,),), ((0.5, 1.0),))]
)
def test_one_anchor_a_cell(anchors):
    with pytest.raises(ValueError, match="MODEL.ANCHOR_GENERATOR: expected one anchor a cell, got 2"):
        make_detector(anchors)


@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_boxes_are_in_strides_from_the_cell_whatever_the_anchors_sides(size, offset):
    detector = make_detector(AnchorOptions(((size,), (2 * size,)), ((1.0,),), offset))
    logits = torch.full((1, PLACES, 3), -9.0, dtype=torch.float64)
    numbers = torch.full((1, PLACES, 4, 17), -50.0, dtype=torch.float64)
    for place, label, score in ((3 * 10 + 4, 1, 2.0), (80 + 2 * 5 + 3, 0, 1.0)):
        logits[0, place, label] = score
        numbers[0, place, range(4), [2, 1, 3, 4]] = 50
    (found,) = detector.detections(make_predictions(logits, numbers.flatten(2)), [(400, 400)])
    want = []
    for (x, y), stride in (((4, 3), 8), ((3, 2), 16)):
        x, y = (x + offset) * stride, (y + offset) * stride
        want.append([x - 2 * stride, y - stride, x + 3 * stride, y + 4 * stride])
    want = torch.tensor(want, dtype=torch.float64).clamp(min=0)
    torch.testing.assert_close(found.boxes, want)
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0], dtype=torch.float64).sigmoid())
    assert found.labels.tolist() == [1, 0]


def test_the_head_has_no_quality_and_a_factor_for_each_level():
    head = make_detector().head
    assert head.quality is None
    assert head.deltas.weight.shape == (68, 4, 3, 3)
    assert head.delta_scale.tolist() == [1, 1]
