import math

import pytest
import torch

from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from dyhead.detection.boxes.losses import iou as paired_iou
from tests.detection.objects import iou, make_boxes


def log_iou(a, b):
    return -math.log(max(iou(a, b), 1e-6))


def around(a, b):
    return max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])


def giou(a, b):
    """Rezatofighi et al., CVPR 2019, Algorithm 1."""
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    share = iou(a, b)
    union = sum(areas) / (1 + share)  # intersection = IoU * union
    enclosing = math.prod(around(a, b))
    return 1 - share + (enclosing - union) / enclosing


def diou(a, b):
    """Zheng et al., AAAI 2020, Eq. 7."""
    away = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    return 1 - iou(a, b) + away / sum(side**2 for side in around(a, b))


def ciou(a, b):
    """Zheng et al., AAAI 2020, Eqs. 8 to 11."""
    angles = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return diou(a, b) + v * v / (1 - iou(a, b) + v)


@pytest.mark.parametrize(("kind", "by_hand"), [("iou", log_iou), ("giou", giou), ("diou", diou), ("ciou", ciou)])
def test_by_the_papers_formulas(kind, by_hand):
    boxes, targets = make_boxes(60, 60, 60, seed=1), make_boxes(60, 60, 60, seed=2)
    want = [by_hand(a, b) for a, b in zip(boxes.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(
        OVERLAP_LOSSES[kind](boxes, targets), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_boxes_cost_nothing(kind, dtype):
    boxes = make_boxes(5, 60, 60, dtype=dtype)
    got = OVERLAP_LOSSES[kind](boxes, boxes)
    torch.testing.assert_close(got, torch.zeros(5, dtype=dtype), atol=1e-6, rtol=0)


def test_boxes_apart_cost_the_logarithm_of_the_smallest_iou():
    apart = OVERLAP_LOSSES["iou"](torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[5.0, 0.0, 9.0, 4.0]]))
    torch.testing.assert_close(apart, torch.tensor([-math.log(1e-6)]))


def test_boxes_without_area_have_a_finite_loss_and_gradient():
    nothing = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    cost = OVERLAP_LOSSES["iou"](nothing, torch.tensor([[3.0, 3.0, 3.0, 3.0]]))
    cost.sum().backward()
    torch.testing.assert_close(cost.detach(), torch.tensor([-math.log(1e-6)]))
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
def test_gradients_are_those_of_the_loss(kind):
    boxes = make_boxes(4, 60, 60, seed=1, smallest=20).requires_grad_()
    targets = make_boxes(4, 60, 60, seed=3, smallest=20)

    def loss(boxes):
        return OVERLAP_LOSSES[kind](boxes, targets)

    if kind == "ciou":  # the weight of its last term is a constant to the gradient
        loss(boxes).sum().backward()
        assert boxes.grad.isfinite().all()
    else:
        assert torch.autograd.gradcheck(loss, (boxes,))


def test_the_iou_of_pairs_by_loops():
    a, b = make_boxes(200, 40, 40, seed=1), make_boxes(200, 40, 40, seed=2)
    b[:10] = a[:10]
    want = [iou(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert paired_iou(a, b).tolist() == pytest.approx(want)
    assert 20 < sum(share == 0 for share in want) < 180


def test_the_iou_of_empty_boxes_is_0():
    empty, box = torch.tensor([[3.0, 3.0, 3.0, 3.0]]), torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    assert paired_iou(empty, box) == paired_iou(empty, empty) == 0
    assert paired_iou(empty[:0], box[:0]).shape == (0,)
