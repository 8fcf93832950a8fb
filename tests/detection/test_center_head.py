import math

import pytest
import torch
from torch.nn import functional

from dyhead.detection.heads import CenterHead
from dyhead.detection.heads.centers import AGGREGATIONS, Aggregation
from dyhead.ops import deform_conv2d
from tests.detection.objects import read_at

KINDS = pytest.mark.parametrize("points", AGGREGATIONS)


def random(module, std=0.3):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.double()


def positions_of(points, width, height, center):
    """The taps of the kernel that count, each with y and x from the cell: as the paper draws them, and as published."""
    left, right, top, bottom = -width / 2, width / 2, -height / 2, height / 2
    corners = {0: (top, left), 2: (top, right), 4: center, 6: (bottom, left), 8: (bottom, right)}
    if points == "corners_as_published":
        corners[8] = (0, right)
    if points == "nine":
        corners |= {1: (top, 0), 3: (0, left), 5: (0, right), 7: (bottom, 0)}
    return dict(sorted(corners.items()))


def by_loops(aggregation, points, level, size):
    """Cell by cell and point by point."""
    (image,), (sizes,) = level, size
    learned = functional.conv2d(level, aggregation.offset.weight, aggregation.offset.bias, padding=1)[0]
    out = []
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            width, height = sizes[:, i, j].tolist()
            at = positions_of(points, width, height, learned[:2, i, j].tolist())
            assert len(at) == len(learned) - 2
            hidden = aggregation.bias
            for importance, (tap, (y, x)) in zip(learned[2:, i, j].tolist(), at.items(), strict=True):
                seen = read_at(j + x, i + y, image) / (1 + math.exp(-importance)) + torch.zeros(len(image)).double()
                hidden = hidden + aggregation.weight[:, :, tap // 3, tap % 3] @ seen
            out.append(aggregation.predictor.weight[:, :, 0, 0] @ hidden.relu() + aggregation.predictor.bias)
    return torch.stack(out, dim=1).unflatten(1, image.shape[1:])[None]


@KINDS
@pytest.mark.parametrize("shape", [(4, 5), (1, 1)])
@torch.no_grad()
def test_aggregation_by_loops(points, shape):
    aggregation = random(Aggregation(4, 6, 2, points))
    level = torch.randn(1, 4, *shape, dtype=torch.float64)
    size = 2 * torch.randn(1, 2, *shape, dtype=torch.float64)  # negative ones, too
    torch.testing.assert_close(aggregation(level, size), by_loops(aggregation, points, level, size))


@torch.no_grad()
def test_aggregation_by_hand():
    """A box of 4 x 2 cells around the middle of 3 x 5: the corners are all of the first and the last column."""
    aggregation = Aggregation(1, 1, 1).double()
    aggregation.weight.fill_(1.0)
    aggregation.predictor.weight.fill_(1.0)
    level = torch.arange(15, dtype=torch.float64).view(1, 1, 3, 5)
    size = torch.tensor([4.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    # Importances are sigmoid(0): half of 0 + 2 + 4, 5 + 7 + 9 and 10 + 12 + 14.
    assert aggregation(level, size)[0, 0, 1, 2] == (6 + 21 + 36) / 2
    # At the upper left cell, (0, 0), all but the right half of the lower rows is outside: 0 + 2 and 5 + 7.
    assert aggregation(level, size)[0, 0, 0, 0] == (0 + 2 + 5 + 7) / 2


@KINDS
def test_gradients_are_those_of_finite_differences(points):
    aggregation = random(Aggregation(2, 3, 2, points, size_gradient=1.0))
    level = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    size = (1.3 + 0.4 * torch.rand(1, 2, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(aggregation, (level, size))


def test_a_hundredth_of_the_gradient_goes_through_the_positions():
    level = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    for share in (0.01, 1.0, 0.0):
        aggregation = random(Aggregation(4, 6, 2, size_gradient=share))
        size = torch.full((1, 2, 3, 4), 1.7, dtype=torch.float64, requires_grad=True)
        aggregation(level, size).square().sum().backward()
        ends = []
        for sign in (-1, 1):
            moved = size.detach().clone()
            moved[0, 1, 1, 2] += sign * 1e-6
            ends.append(aggregation(level, moved).square().sum().item())
        difference = (ends[1] - ends[0]) / 2e-6
        assert abs(difference) > 1e-2
        assert size.grad[0, 1, 1, 2].item() == pytest.approx(share * difference, rel=1e-4)


def make_head(**more):
    return random(CenterHead(4, 3, hidden=6, **more))


@pytest.mark.parametrize("refine_center", [False, True])
def test_what_is_predicted(refine_center):
    head, level = make_head(refine_center=refine_center), torch.randn(2, 4, 3, 4, dtype=torch.float64)

    def predicted(conv, predictor):
        return predictor(functional.relu(functional.conv2d(level, conv.weight, conv.bias, padding=1)))

    center, size = predicted(head.center_conv, head.centers), predicted(head.box_conv, head.deltas)
    more = head.aggregation(level, size)
    want = [center, size, size + more[:, :2]]
    if refine_center:
        want.append(center + more[:, 2:])
    want.append(predicted(head.corner_conv, head.corners))
    (logits,), (numbers,), quality = head([level])
    torch.testing.assert_close(logits, predicted(head.class_conv, head.logits))
    torch.testing.assert_close(numbers, torch.cat(want, dim=1))
    assert quality is None
    (_,), (numbers,), _ = head.eval()([level])
    torch.testing.assert_close(numbers, torch.cat(want[:-1], dim=1))


@pytest.mark.parametrize("refine_center", [False, True])
def test_what_refines_gives_no_gradient_to_what_it_refines_but_through_positions(refine_center):
    head = make_head(refine_center=refine_center, size_gradient=0.0)
    _, numbers, _ = head([torch.randn(1, 4, 3, 4, dtype=torch.float64)])
    numbers[0][:, 4:-4].sum().backward()
    with_gradient = {key for key, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == {key for key, _ in head.named_parameters() if key.startswith("aggregation.")}


def test_at_the_start_nothing_is_refined_and_probabilities_are_the_prior():
    torch.manual_seed(0)
    head = CenterHead(16, 5, hidden=8, prior_prob=0.2, refine_center=True)
    (logits,), (numbers,), _ = head([torch.randn(2, 16, 8, 8)])
    for heat in (logits, numbers[:, -4:]):
        torch.testing.assert_close(heat.sigmoid(), torch.full_like(heat, 0.2), rtol=0.2, atol=0)
    assert torch.equal(numbers[:, 4:6], numbers[:, 2:4])
    assert torch.equal(numbers[:, 6:8], numbers[:, :2])


@torch.no_grad()
def test_at_the_start_what_is_read_reaches_the_predictors():
    """He et al.: after ReLU the mean square is that of the input."""
    torch.manual_seed(0)
    head, level = CenterHead(32, 2, hidden=64), torch.randn(1, 32, 20, 20)
    seen = [layer(level) for layer in (head.class_conv, head.box_conv, head.center_conv, head.corner_conv)]
    grid, weight = torch.zeros(1, 18, 20, 20), head.aggregation.weight
    seen.append(deform_conv2d(level, grid, weight, padding=1))
    for each in seen:
        assert each[..., 1:-1, 1:-1].relu().square().mean().item() == pytest.approx(1, rel=0.15)


def test_levels_for_classes_and_for_boxes_and_towers():
    head = make_head(num_convs=1)
    of_class, of_box = (torch.randn(1, 4, 3, 4, dtype=torch.float64) for _ in range(2))
    (logits,), (numbers,), _ = head([(of_class, of_box)])
    (want,), (_,), _ = head([of_class])
    assert torch.equal(logits, want)
    (_,), (want,), _ = head([of_box])
    assert torch.equal(numbers, want)
    size = head.deltas(head.box_conv(head.box_tower[0](of_box, 0)).relu())
    torch.testing.assert_close(numbers[:, 2:4], size)


def test_predictions_are_float32_at_least():
    torch.manual_seed(0)
    head = CenterHead(8, 2, hidden=8)
    torch.nn.init.normal_(head.aggregation.predictor.weight, std=0.3)
    levels = [torch.randn(1, 8, 4, 4)]
    want = head(levels)
    with torch.autocast("cpu", torch.bfloat16):
        logits, numbers, _ = head(levels)
    assert {level.dtype for level in (*logits, *numbers)} == {torch.float32}
    torch.testing.assert_close(numbers[0], want[1][0], rtol=0.02, atol=0.02)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="points: expected one of nine, corners, corners_as_published, got 'ten'"):
        CenterHead(8, 2, points="ten")
    with pytest.raises(ValueError, match="predictor_channels: expected at least 1, got 0"):
        CenterHead(8, 2, hidden=0)
