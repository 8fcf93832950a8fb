import math

import pytest
import torch

from dyhead.detection.boxes import Distances, Distribution
from dyhead.detection.boxes.losses import OVERLAP_LOSSES
from tests.detection.objects import make_boxes

LN2 = math.log(2)
ANCHOR = [4.0, 8.0, 12.0, 16.0]  # the point 8, 12 of stride 8


def numbers_of(*sides, dtype=torch.float64):
    """Logits of one place from the probabilities of its sides' distances."""
    return torch.tensor([p for side in sides for p in side], dtype=dtype).log()[None]


def one_hot(*distances, reg_max=4):
    return numbers_of(*([float(i == d) for i in range(reg_max + 1)] for d in distances))


def random_places(count, reg_max, seed=0):
    """Logits, anchors of stride 4, and boxes around their points."""
    generator = torch.Generator().manual_seed(seed)
    boxes = make_boxes(count, 60, 80, seed=seed, smallest=6)
    shares = 0.2 + 0.6 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    points = boxes[:, :2] + shares * (boxes[:, 2:] - boxes[:, :2])
    numbers = 2 * torch.randn(count, 4 * (reg_max + 1), generator=generator, dtype=torch.float64)
    return numbers, torch.cat([points - 2, points + 2], dim=1), boxes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decodes_by_hand(dtype):
    # Expectations in strides of 8: 0.5 * 0 + 0.5 * 1 = 0.5; 2; 0.25 * 1 + 0.75 * 2 = 1.75; (0 + 1 + 2) / 3 = 1.
    # From the point (8, 12): 8 - 4, 12 - 16, 8 + 14, 12 + 8.
    numbers = numbers_of([0.5, 0.5, 0], [0, 0, 1], [0, 0.25, 0.75], [1 / 3, 1 / 3, 1 / 3], dtype=dtype)
    got = Distribution(2).decode(numbers, torch.tensor([ANCHOR], dtype=dtype))
    torch.testing.assert_close(got, torch.tensor([[4.0, -4.0, 22.0, 20.0]], dtype=dtype))


@pytest.mark.parametrize("reg_max", [1, 4, 16])
def test_decodes_by_loops(reg_max):
    form = Distribution(reg_max)
    numbers, anchors, _ = random_places(6, reg_max)
    assert form.per_place == numbers.shape[1] == 4 * (reg_max + 1)
    for got, logits, anchor in zip(
        form.decode(numbers, anchors).tolist(), numbers.tolist(), anchors.tolist(), strict=True
    ):
        sides = []
        for side in range(4):
            powers = [math.exp(x) for x in logits[side * (reg_max + 1) : (side + 1) * (reg_max + 1)]]
            sides.append(4 * sum(i * power for i, power in enumerate(powers)) / sum(powers))
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        assert got == pytest.approx([x - sides[0], y - sides[1], x + sides[2], y + sides[3]])


def test_certain_distances_are_those_of_the_distance_form():
    anchors = torch.tensor([ANCHOR], dtype=torch.float64)
    plain = Distances("relu").decode(torch.tensor([[3.0, 0, 1, 4]], dtype=torch.float64), anchors)
    torch.testing.assert_close(Distribution(4).decode(one_hot(3, 0, 1, 4), anchors), plain)


@pytest.mark.parametrize("kind", list(OVERLAP_LOSSES))
def test_the_loss_is_that_of_the_boxes(kind):
    numbers, anchors, boxes = random_places(10, 16)
    form = Distribution(16, kind)
    want = OVERLAP_LOSSES[kind](form.decode(numbers, anchors), boxes)
    torch.testing.assert_close(form.loss(numbers, anchors, boxes), want)


def test_the_focal_loss_by_hand():
    # P = (1/4, 1/2, 1/4) on each side. The box's sides are 1, 0.5, 1.75 and 0 strides of 8 from (8, 12), so that they
    # cost -ln 1/2, -(0.5 ln 1/4 + 0.5 ln 1/2), -(0.25 ln 1/2 + 0.75 ln 1/4), -ln 1/4: 1, 1.5, 1.75 and 2 times ln 2.
    numbers = numbers_of(*[[0.25, 0.5, 0.25]] * 4)
    boxes = torch.tensor([[8 - 8.0, 12 - 4.0, 8 + 14.0, 12.0]], dtype=torch.float64)
    got = Distribution(2).focal_loss(numbers, torch.tensor([ANCHOR], dtype=torch.float64), boxes)
    assert got.tolist() == pytest.approx([(1 + 1.5 + 1.75 + 2) / 4 * LN2])


@pytest.mark.parametrize("reg_max", [1, 3, 16])
def test_the_focal_loss_by_loops(reg_max):
    numbers, anchors, boxes = random_places(12, reg_max)
    got = Distribution(reg_max).focal_loss(numbers, anchors, boxes)
    beyond = 0
    for cost, logits, anchor, box in zip(got.tolist(), numbers.tolist(), anchors.tolist(), boxes.tolist(), strict=True):
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        want = 0.0
        for side, distance in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
            beyond += distance / 4 > reg_max
            d = min(distance / 4, reg_max - 0.1)
            i = math.floor(d)
            powers = [math.exp(value) for value in logits[side * (reg_max + 1) : (side + 1) * (reg_max + 1)]]
            p = [power / sum(powers) for power in powers]
            want -= ((i + 1 - d) * math.log(p[i]) + (d - i) * math.log(p[i + 1])) / 4
        assert cost == pytest.approx(want)
    assert beyond or reg_max == 16


def test_sides_beyond_the_last_distance_and_points_outside_the_box():
    # From (8, 12): the left side is 100 strides away and counts as 1.9; the others lie on the wrong side, at 0.
    boxes = torch.tensor([[8 - 800.0, 13.0, 7.0, 11.0]], dtype=torch.float64)
    numbers = numbers_of([0.2, 0.3, 0.5], *[[0.5, 0.25, 0.25]] * 3)
    got = Distribution(2).focal_loss(numbers, torch.tensor([ANCHOR], dtype=torch.float64), boxes)
    assert got.tolist() == pytest.approx([(-0.1 * math.log(0.3) - 0.9 * math.log(0.5) + 3 * LN2) / 4])


def test_the_focal_loss_is_least_where_the_two_nearest_distances_share_the_probability():
    anchors = torch.tensor([ANCHOR], dtype=torch.float64)
    d = 2.3
    boxes = torch.tensor([[8 - 8 * d, 12 - 8 * d, 8 + 8 * d, 12 + 8 * d]], dtype=torch.float64)
    numbers = numbers_of(*[[1e-9, 1e-9, 0.7, 0.3, 1e-9]] * 4).requires_grad_()
    Distribution(4).focal_loss(numbers, anchors, boxes).sum().backward()
    assert numbers.grad.abs().max() < 1e-6
    torch.testing.assert_close(Distribution(4).decode(numbers.detach(), anchors), boxes)


@pytest.mark.parametrize("what", ["decode", "loss", "focal_loss"])
def test_gradients_by_finite_differences(what):
    numbers, anchors, boxes = random_places(3, 4)
    arguments = (anchors,) if what == "decode" else (anchors, boxes)
    assert torch.autograd.gradcheck(lambda x: getattr(Distribution(4), what)(x, *arguments), numbers.requires_grad_())


def test_extreme_logits_have_finite_losses_and_gradients():
    numbers = torch.zeros(1, 20)
    numbers[0, ::5], numbers[0, 1::5] = 1000.0, -1000.0
    numbers.requires_grad_()
    anchors, boxes = torch.tensor([ANCHOR]), torch.tensor([[0.0, 0.0, 20.0, 30.0]])
    form = Distribution(4)
    cost = form.loss(numbers, anchors, boxes) + form.focal_loss(numbers, anchors, boxes)
    cost.sum().backward()
    assert cost.isfinite().all()
    assert numbers.grad.isfinite().all()


def test_no_places():
    numbers = torch.zeros(0, 20, requires_grad=True)
    form, none = Distribution(4), torch.zeros(0, 4)
    assert form.decode(numbers, none).shape == (0, 4)
    cost = form.loss(numbers, none, none).sum() + form.focal_loss(numbers, none, none).sum()
    assert cost == 0
    cost.backward()
    assert numbers.grad.shape == (0, 20)
