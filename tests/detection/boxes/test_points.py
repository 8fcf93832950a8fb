import math
import statistics
import warnings

import pytest
import torch

from dyhead.detection.boxes import Points
from dyhead.detection.boxes.points import KINDS

GRID = [(y, x) for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)]
ANCHOR = torch.tensor([[12.0, 20.0, 20.0, 28.0]], dtype=torch.float64)  # a place at x = 16, y = 24, of stride 8


def numbers_of(first, refined):
    return torch.tensor([[coordinate for point in [*first, *refined] for coordinate in point]], dtype=torch.float64)


def make_numbers(count, num_points=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, 4 * num_points, generator=generator, dtype=torch.float64)


def make_anchors(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    low = 100 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    stride = 2.0 ** torch.randint(3, 8, (count, 1), generator=generator).double()
    return torch.cat([low, low + stride], dim=1)


def boxes_by_loops(form, numbers, anchors):
    boxes = []
    for row, (x0, y0, x1, y1) in zip(numbers.tolist(), anchors.tolist(), strict=True):
        row = row[len(row) // 2 :]
        ys, xs = row[0::2], row[1::2]
        if form.kind == "partial_minmax":
            ys, xs = ys[:4], xs[:4]
        sides = []
        for values, low, high, i in ((xs, x0, x1, 0), (ys, y0, y1, 1)):
            if form.kind == "moment":
                middle = statistics.fmean(values)
                half = statistics.stdev(values) * math.exp(form.log_scale[i].item())
                ends = middle - half, middle + half
            else:
                ends = min(values), max(values)
            sides.append([(low + high) / 2 + end * (high - low) for end in ends])
        boxes.append([sides[0][0], sides[1][0], sides[0][1], sides[1][1]])
    return torch.tensor(boxes, dtype=torch.float64)


def test_the_moments_by_hand():
    # Of -1, 0, 1, three times each, the mean is 0 and the deviation sqrt(6 / 8) = 0.8660; times 8 pixels: 6.9282.
    # Widths are twice that, since exp(log 2) = 2: x from 16 - 13.8564 to 16 + 13.8564, y from 24 - 6.9282 on.
    form = Points().double()
    with torch.no_grad():
        form.log_scale.copy_(torch.tensor([math.log(2), 0.0]))
    want = torch.tensor([[2.1435935, 17.0717968, 29.8564065, 30.9282032]], dtype=torch.float64)
    moved = [(y + 2, x - 1) for y, x in GRID]  # 16 pixels down, 8 to the left
    torch.testing.assert_close(form.decode(numbers_of(moved, GRID), ANCHOR), want)
    torch.testing.assert_close(form.decode_first(numbers_of(GRID, moved), ANCHOR), want)
    shift = torch.tensor([-8.0, 16.0, -8.0, 16.0], dtype=torch.float64)
    torch.testing.assert_close(form.decode(numbers_of(GRID, moved), ANCHOR), want + shift)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("minmax", [16 - 8 * 3, 24 - 8, 16 + 8 * 5, 24 + 8 * 7]),  # x from -3 to 5 cells, y from -1 to 7
        ("partial_minmax", [16 - 8, 24 - 8, 16 + 8 * 5, 24]),  # of (-1, -1), (-1, 5), (-1, 1) and (0, -1)
    ],
)
def test_the_outermost_points_by_hand(kind, want):
    points = list(GRID)
    points[1], points[4], points[8] = (-1.0, 5.0), (7.0, 0.0), (0.0, -3.0)
    got = Points(kind=kind).decode(numbers_of(GRID, points), ANCHOR)
    assert got.tolist() == [want]


def test_the_loss_by_hand():
    # The box is 8, 16, 24, 32. In units of 4 * 8 pixels the sides are 16 / 32 = 0.5, 1.6 / 32 = 0.05, 0 and 0 off:
    # 0.5 - 0.11 / 2 = 0.445 and 0.05**2 / (2 * 0.11) = 0.0113636.
    form, numbers = Points(kind="minmax"), numbers_of(GRID, GRID)
    truth = torch.tensor([[-8.0, 17.6, 24.0, 32.0]], dtype=torch.float64)
    assert form.loss(numbers, ANCHOR, truth).tolist() == pytest.approx([0.445 + 0.0025 / 0.22])
    far = numbers_of([(y, x + 100) for y, x in GRID], GRID)
    assert form.loss(far, ANCHOR, truth).tolist() == pytest.approx([0.445 + 0.0025 / 0.22])
    assert form.loss_first(far, ANCHOR, truth).item() > 25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_points", [9, 25])
def test_boxes_by_loops(kind, num_points):
    form = Points(num_points, kind).double()
    if form.log_scale is not None:
        torch.nn.init.normal_(form.log_scale)
    numbers, anchors = make_numbers(20, num_points), make_anchors(20)
    torch.testing.assert_close(form.decode(numbers, anchors), boxes_by_loops(form, numbers, anchors))
    swapped = numbers.roll(2 * num_points, dims=1)
    torch.testing.assert_close(form.decode_first(swapped, anchors), boxes_by_loops(form, numbers, anchors))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    form, numbers, anchors = Points(kind=kind).double(), make_numbers(3).requires_grad_(), make_anchors(3)
    truth = anchors + torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda x: form.loss(x, anchors, truth), numbers)
    assert torch.autograd.gradcheck(lambda x: form.loss_first(x, anchors, truth), numbers)


def test_the_learned_factors_have_a_hundredth_of_their_gradient():
    form, numbers, anchors = Points().double(), make_numbers(3), make_anchors(3)
    form.decode(numbers, anchors)[:, 2:].sum(dim=0).dot(torch.tensor([1.0, 3.0], dtype=torch.float64)).backward()
    step, differences = 1e-6, []
    for i, factor in enumerate((1.0, 3.0)):
        ends = []
        for sign in (-1, 1):
            with torch.no_grad():
                form.log_scale.zero_()[i] = sign * step
                ends.append(factor * form.decode(numbers, anchors)[:, 2 + i].sum().item())
        differences.append((ends[1] - ends[0]) / (2 * step))
    assert form.log_scale.grad.tolist() == pytest.approx([0.01 * each for each in differences], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_points_that_coincide_have_a_finite_gradient(kind):
    form, numbers = Points(kind=kind), torch.full((1, 36), 0.5, requires_grad=True)
    form.loss(numbers, ANCHOR.float(), torch.tensor([[0.0, 0.0, 30.0, 30.0]])).sum().backward()
    assert numbers.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_places_at_all(kind):
    form, numbers = Points(kind=kind), torch.zeros(0, 36, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boxes = form.decode(numbers, torch.zeros(0, 4))
        form.loss(numbers, torch.zeros(0, 4), torch.zeros(0, 4)).sum().backward()
    assert boxes.shape == (0, 4)
    assert all(parameter.grad is not None for parameter in form.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, "mean"), "kind: expected one of moment, minmax, partial_minmax, got 'mean'"),
        ((1, "moment"), "num_points: expected at least 2 with moment, got 1"),
        ((3, "partial_minmax"), "num_points: expected at least 4 with partial_minmax, got 3"),
    ],
)
def test_names_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        Points(*arguments)
