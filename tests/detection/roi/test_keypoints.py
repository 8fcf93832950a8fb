"""Keypoints as heatmaps of regions."""

import math

import pytest
import torch

from dyhead.detection.roi.keypoints import find_keypoints, keypoint_loss

BOX = torch.tensor([[10.0, 20, 30, 60]])  # cells of 4 are 5 x 10 pixels
# x, y, visibility; the cell's row and column where it counts.
CASES = [
    ((10.0, 20.0, 2), (0, 0)),
    ((14.9, 29.9, 1), (0, 0)),
    ((15.0, 30.0, 2), (1, 1)),
    ((30.0, 60.0, 2), (3, 3)),  # the far corner still counts
    ((30.0, 25.0, 2), (0, 3)),
    ((30.1, 25.0, 2), None),
    ((9.9, 25.0, 2), None),
    ((20.0, 60.1, 2), None),
    ((20.0, 40.0, 0), None),
]


@pytest.mark.parametrize(("keypoint", "cell"), CASES)
def test_the_loss_is_the_cross_entropy_of_the_cell_that_a_keypoint_lies_in(keypoint, cell):
    logits = torch.randn(1, 1, 4, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    loss = keypoint_loss(logits, BOX, torch.tensor([[keypoint]]))
    loss.backward()
    if cell is None:
        assert loss == 0
        assert (logits.grad == 0).all()
    else:
        numbers = logits[0, 0].tolist()
        total = math.log(sum(math.exp(x) for row in numbers for x in row))
        assert loss.item() == pytest.approx(total - numbers[cell[0]][cell[1]], rel=1e-5)


def test_the_loss_is_divided_by_the_keypoints_that_count_or_as_told():
    logits = torch.randn(1, len(CASES), 4, 4, generator=torch.Generator().manual_seed(0))
    keypoints = torch.tensor([[keypoint for keypoint, _ in CASES]])
    each = [keypoint_loss(logits[:, [i]], BOX, keypoints[:, [i]]).item() for i in range(len(CASES))]
    assert keypoint_loss(logits, BOX, keypoints).item() == pytest.approx(sum(each) / 5, rel=1e-5)
    assert keypoint_loss(logits, BOX, keypoints, divisor=8.0).item() == pytest.approx(sum(each) / 8, rel=1e-5)
    assert keypoint_loss(logits[:0], BOX[:0], keypoints[:0]) == 0


def test_the_highest_cell_is_found_where_it_is_and_its_score_is_its_part():
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 0, 1, 2] = logits[0, 1, 3, 0] = 9.0
    logits[1, :, 2, 2] = 20.0
    boxes = torch.cat([BOX, torch.tensor([[100.0, 50, 104, 54]])])  # of the second, a cell is a pixel
    found = find_keypoints(logits, boxes)
    assert found.shape == (2, 2, 3)
    (x, y, score), (left, bottom, _) = found[0].tolist()
    # Cells are 5 x 10 pixels; the interpolated maximum is near the cell's center, and at a border beyond it.
    assert x == pytest.approx(10 + 2.5 * 5, abs=2.5)
    assert y == pytest.approx(20 + 1.5 * 10, abs=5)
    assert (left < 15, bottom > 50) == (True, True)
    assert score == pytest.approx(1, abs=0.2)
    assert found[1, :, :2].tolist() == [[102.5, 52.5]] * 2
    assert found[1, :, 2].tolist() == pytest.approx([1 / (1 + 15 * math.exp(-20))] * 2)
    assert find_keypoints(logits[:0], boxes[:0]).shape == (0, 2, 3)


def test_a_box_of_less_than_a_pixel_has_its_keypoints_at_its_place():
    found = find_keypoints(torch.randn(1, 1, 4, 4), torch.tensor([[7.0, 8, 7.2, 8.1]]))
    assert found[0, 0, :2].tolist() == pytest.approx([7.5, 8.5])  # of the pixel that is the least
