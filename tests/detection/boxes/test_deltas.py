import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from dyhead.detection.boxes import Deltas
from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from tests.detection.objects import make_boxes

WEIGHTS = (10.0, 8.0, 5.0, 4.0)


def make_pairs(count=20, dtype=torch.float64):
    return make_boxes(count, 90, 120, seed=1, dtype=dtype), make_boxes(count, 90, 120, seed=2, smallest=4, dtype=dtype)


def test_by_hand():
    anchor, box = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[20.0, 20.0, 60.0, 40.0]])
    want = torch.tensor([[2 * 20 / 20, 3 * -10 / 40, 4 * math.log(40 / 20), 5 * math.log(20 / 40)]])
    form = Deltas((2.0, 3.0, 4.0, 5.0))
    torch.testing.assert_close(form.encode(box, anchor), want)
    torch.testing.assert_close(form.decode(want, anchor), box)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), WEIGHTS])
def test_equals_torchvisions_coder(weights):
    boxes, anchors = make_pairs()
    form, coder = Deltas(weights), BoxCoder(weights)
    torch.testing.assert_close(form.encode(boxes, anchors), coder.encode_single(boxes, anchors))
    numbers = 3 * torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(form.decode(numbers, anchors), coder.decode_single(numbers, anchors))


def test_decodes_what_was_encoded():
    boxes, anchors = make_pairs()
    form = Deltas(WEIGHTS)
    torch.testing.assert_close(form.decode(form.encode(boxes, anchors), anchors), boxes)


def test_a_box_grows_by_no_more_than_1000_sixteenths():
    numbers, anchor = torch.tensor([[0.0, 0.0, 200.0, 1000.0]]), torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
    torch.testing.assert_close(Deltas().decode(numbers, anchor), torch.tensor([[-500.0, -500.0, 500.0, 500.0]]))


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_smooth_l1_by_loops(beta):
    boxes, anchors = make_pairs()
    form = Deltas(WEIGHTS, smooth_l1_loss_beta=beta)
    numbers = form.encode(boxes, anchors) + torch.randn(20, 4, dtype=torch.float64) * 0.2
    want = []
    for predicted, true in zip(numbers.tolist(), BoxCoder(WEIGHTS).encode_single(boxes, anchors).tolist(), strict=True):
        errors = [abs(p - t) for p, t in zip(predicted, true, strict=True)]
        want.append(sum(0.5 * e * e / beta if e < beta else e - 0.5 * beta for e in errors))
    torch.testing.assert_close(form.loss(numbers, anchors, boxes), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
def test_overlap_losses_are_of_decoded_boxes(kind):
    boxes, anchors = make_pairs()
    numbers = torch.randn(20, 4, dtype=torch.float64)
    decoded = BoxCoder(WEIGHTS).decode_single(numbers, anchors)
    got = Deltas(WEIGHTS, bbox_reg_loss_type=kind).loss(numbers, anchors, boxes)
    torch.testing.assert_close(got, OVERLAP_LOSSES[kind](decoded, boxes))


@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_no_positives_cost_nothing_and_have_a_gradient(kind):
    numbers = torch.zeros(0, 4, requires_grad=True)
    cost = Deltas(bbox_reg_loss_type=kind).loss(numbers, torch.zeros(0, 4), torch.zeros(0, 4))
    assert cost.shape == (0,)
    cost.sum().backward()
    assert numbers.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["smooth_l1", "iou", "giou"])
def test_keeps_the_dtype(kind, dtype):
    boxes, anchors = make_pairs(dtype=dtype)
    form = Deltas(WEIGHTS, kind)
    numbers = form.encode(boxes, anchors)
    assert {numbers.dtype, form.decode(numbers, anchors).dtype, form.loss(numbers, anchors, boxes).dtype} == {dtype}
