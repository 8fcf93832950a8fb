import torch

from dyhead.detection.quality import centerness
from tests.detection.objects import make_boxes


def test_equals_the_papers_equation():
    boxes = make_boxes(20, 50, 70)
    points = boxes[:, :2] + torch.rand(20, 2, dtype=torch.float64) * (boxes[:, 2:] - boxes[:, :2])
    want = []
    for (x, y), (x0, y0, x1, y1) in zip(points.tolist(), boxes.tolist(), strict=True):
        left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y
        want.append((min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)) ** 0.5)
    torch.testing.assert_close(centerness(points, boxes), torch.tensor(want, dtype=torch.float64))


def test_the_middle_has_1_and_the_border_0():
    boxes = torch.tensor([[0.0, 0.0, 8.0, 4.0]]).expand(3, 4)
    points = torch.tensor([[4.0, 2.0], [0.0, 2.0], [2.0, 2.0]])
    torch.testing.assert_close(centerness(points, boxes), torch.tensor([1.0, 0.0, (2 / 6) ** 0.5]))


def test_no_points():
    assert centerness(torch.zeros(0, 2), torch.zeros(0, 4)).shape == (0,)
