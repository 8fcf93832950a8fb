import math

import pytest
import torch

from dyhead.detection.boxes import Distances
from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from tests.detection.objects import make_boxes

NUMBERS = [[1.0, 0.5, 2.0, 0.25], [-1.0, 0.0, 3.0, -2.0]]
ANCHORS = [[4.0, 8.0, 12.0, 16.0], [-8.0, 0.0, 8.0, 16.0]]  # points 8, 12 of stride 8 and 0, 8 of stride 16


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("relu", [[0.0, 8.0, 24.0, 14.0], [0.0, 8.0, 48.0, 8.0]]),
        (
            "exp",
            [
                [8 - math.e, 12 - math.exp(0.5), 8 + math.exp(2), 12 + math.exp(0.25)],
                [-math.exp(-1), 7.0, math.exp(3), 8 + math.exp(-2)],
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decodes_by_hand(kind, want, dtype):
    got = Distances(kind).decode(torch.tensor(NUMBERS, dtype=dtype), torch.tensor(ANCHORS, dtype=dtype))
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype))


@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
@pytest.mark.parametrize("distances", ["relu", "exp"])
def test_the_loss_is_that_of_the_boxes(distances, kind):
    boxes = make_boxes(10, 100, 100)
    points = (boxes[:, :2] + boxes[:, 2:]) / 2 + 0.1
    anchors = torch.cat([points - 4, points + 4], dim=1)
    numbers = torch.rand(10, 4, dtype=torch.float64) + 0.5
    sides = numbers.exp() if distances == "exp" else 8 * numbers
    predicted = torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1)
    got = Distances(distances, kind).loss(numbers, anchors, boxes)
    torch.testing.assert_close(got, OVERLAP_LOSSES[kind](predicted, boxes))


def test_the_true_distances_cost_nothing():
    box, point, stride = torch.tensor([[10.0, 20.0, 50.0, 44.0]]), torch.tensor([24.0, 28.0]), 8
    anchor = torch.cat([point - stride / 2, point + stride / 2])[None]
    sides = torch.tensor([[24.0 - 10, 28.0 - 20, 50 - 24.0, 44 - 28.0]])
    torch.testing.assert_close(Distances("relu").loss(sides / stride, anchor, box), torch.zeros(1))
    torch.testing.assert_close(Distances("exp").loss(sides.log(), anchor, box), torch.zeros(1))


@pytest.mark.parametrize("sides", [(0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1)])
@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
def test_a_prediction_without_extent_has_a_finite_gradient(kind, sides):
    numbers = torch.tensor([sides], dtype=torch.float32, requires_grad=True)
    cost = Distances("relu", kind).loss(numbers, torch.tensor([ANCHORS[0]]), torch.tensor([[0.0, 0.0, 20.0, 20.0]]))
    cost.sum().backward()
    assert cost.isfinite().all()
    assert numbers.grad.isfinite().all()
