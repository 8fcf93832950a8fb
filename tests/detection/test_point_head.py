import pytest
import torch
from torch.nn import functional

from dyhead.detection.heads import PointHead
from tests.detection.objects import read_at


def make_head(channels=4, num_classes=2, **more):
    torch.manual_seed(0)
    head = PointHead(channels, num_classes, **more).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def by_loops(head, level):
    """Logits, first and refined points of a level (1, C, H, W), cell by cell and point by point."""
    (image,) = level
    first = functional.conv2d(level, head.first_conv.weight, head.first_conv.bias, padding=1).relu()
    first = functional.conv2d(first, head.first_points.weight, head.first_points.bias)
    outputs = [[], []]
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            points = first[0, :, i, j].tolist()
            for found, conv, predictor in (
                (outputs[0], head.class_conv, head.logits),
                (outputs[1], head.box_conv, head.deltas),
            ):
                hidden = 0
                for tap, (y, x) in enumerate(zip(points[0::2], points[1::2], strict=True)):
                    weight = conv.weight[:, :, tap // conv.weight.shape[3], tap % conv.weight.shape[3]]
                    hidden = hidden + weight @ (read_at(j + x, i + y, image) + torch.zeros(len(image)).double())
                found.append(predictor.weight[:, :, 0, 0] @ hidden.relu() + predictor.bias)
    logits, deltas = (torch.stack(found, dim=1).unflatten(1, image.shape[1:])[None] for found in outputs)
    return logits, first, first + deltas


@pytest.mark.parametrize(("size", "num_points"), [((3, 4), 9), ((1, 1), 9), ((2, 3), 25)])
@torch.no_grad()
def test_reads_the_level_at_the_first_points(size, num_points):
    head, level = make_head(num_points=num_points, kernel_size=1), torch.randn(1, 4, *size, dtype=torch.float64)
    (logits,), (points,), quality = head([level])
    want_logits, first, refined = by_loops(head, level)
    torch.testing.assert_close(logits, want_logits)
    torch.testing.assert_close(points, torch.cat([first, refined], dim=1))
    assert quality is None
    assert first.abs().max() > 0.5  # not on the grid


def test_a_tenth_of_the_gradient_goes_through_the_positions():
    """The classes' gradient by the first points' bias is 0.1 of the finite difference, unless told otherwise."""
    level = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    for share in (0.1, 1.0, 0.0):
        head = make_head(kernel_size=1, points_gradient=share)
        head([level])[0][0].square().sum().backward()
        ends = []
        for sign in (-1, 1):
            with torch.no_grad():
                head.first_points.bias[3] += sign * 1e-6
                ends.append(head([level])[0][0].square().sum().item())
                head.first_points.bias[3] -= sign * 1e-6
        difference = (ends[1] - ends[0]) / 2e-6
        assert abs(difference) > 1e-2
        assert head.first_points.bias.grad[3].item() == pytest.approx(share * difference, rel=1e-4)


def test_no_gradient_of_the_refined_points_reaches_the_first_but_through_positions():
    head = make_head(kernel_size=1, points_gradient=0.0)
    (points,) = head([torch.randn(1, 4, 3, 4, dtype=torch.float64)])[1]
    points[:, 18:].sum().backward()
    assert not head.first_points.bias.grad.any()
    assert head.deltas.bias.grad.any()


def test_starts_at_the_prior_with_points_on_the_place():
    torch.manual_seed(0)
    (logits,), (points,), _ = PointHead(16, 5, prior_prob=0.02, num_convs=1)([torch.randn(2, 16, 8, 8)])
    torch.testing.assert_close(logits.sigmoid(), torch.full((2, 5, 8, 8), 0.02), rtol=0.05, atol=0)
    assert points.shape == (2, 36, 8, 8)
    assert points.abs().max() < 0.05


def test_point_convolutions_keep_the_size_of_what_they_read():
    """After ReLU the mean square is what it was: the predictors, and what is before, get a signal from the start."""
    torch.manual_seed(0)
    head = PointHead(64, 2)
    level = torch.randn(1, 64, 16, 16)
    on_the_grid = head.class_conv.grid.float().expand(1, 18, 16, 16)
    for conv in (head.class_conv, head.box_conv):
        inside = conv(level, on_the_grid)[..., 1:-1, 1:-1]
        assert inside.relu().square().mean().item() == pytest.approx(1, rel=0.1)


def test_towers_stand_before():
    head = make_head(num_convs=1, num_levels=2, norm="BN")
    levels = [torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 4, 2, 2, dtype=torch.float64)]
    got = head(levels)
    for i, level in enumerate(levels):
        of_class, of_box = head.class_tower[0](level, i), head.box_tower[0](level, i)
        first = head.first_points(head.first_conv(of_box).relu())
        torch.testing.assert_close(got[0][i], head.logits(head.class_conv(of_class, first).relu()))
        torch.testing.assert_close(got[1][i][:, 18:], first + head.deltas(head.box_conv(of_box, first).relu()))
    with pytest.raises(ValueError, match="levels: expected 2, got 1"):
        head(levels[:1])


def test_predictions_are_float32_at_least():
    with torch.autocast("cpu", torch.bfloat16):
        logits, points, _ = PointHead(8, 2)([torch.randn(1, 8, 4, 4)])
    assert {level.dtype for level in (*logits, *points)} == {torch.float32}


@pytest.mark.parametrize("num_points", [-1, 0, 4, 8, 16])
def test_points_are_the_square_of_an_odd_number(num_points):
    with pytest.raises(ValueError, match=f"num_points: expected the square of an odd number, got {num_points}"):
        PointHead(8, 2, num_points=num_points)
