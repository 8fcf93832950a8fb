import pytest
import torch

from dyhead.detection.boxes import Centers

# Two cells of stride 4, at (8, 12) and at (0, 0).
ANCHORS = torch.tensor([[6.0, 10, 10, 14], [-2, -2, 2, 2]], dtype=torch.float64)
# The center, the size, the refined size, the refined center.
NUMBERS = torch.tensor([[0.5, 0.25, 3, 5, 4, 2, 1, 0.75], [0, 0.5, 1, 1, -1, 0.5, 0, 0]], dtype=torch.float64)


def test_boxes_by_hand():
    # 8 + 0.5 * 4 = 10 and 12 + 0.25 * 4 = 13, plus and minus 8 and 4; a negative width turns left and right around.
    want = torch.tensor([[2, 9, 18, 17], [2, 1, -2, 3]], dtype=torch.float64)
    assert torch.equal(Centers().decode(NUMBERS, ANCHORS), want)
    # 8 + 1 * 4 = 12 and 12 + 0.75 * 4 = 15.
    want = torch.tensor([[4, 11, 20, 19], [2, -1, -2, 1]], dtype=torch.float64)
    assert torch.equal(Centers(refined=True).decode(NUMBERS, ANCHORS), want)
    assert (Centers().per_place, Centers(refined=True).per_place) == (6, 8)


def test_what_is_beyond_the_numbers_is_not_read():
    more = torch.cat([NUMBERS[:, :6], torch.full((2, 4), torch.nan, dtype=torch.float64)], dim=1)
    assert torch.equal(Centers().decode(more, ANCHORS), Centers().decode(NUMBERS, ANCHORS))
    boxes = torch.tensor([[2.0, 9, 18, 17], [0, 0, 8, 8]])
    assert torch.equal(Centers().costs(more, ANCHORS, boxes), Centers().costs(NUMBERS, ANCHORS, boxes))


def test_costs_by_hand():
    # The first box is at (12, 14) of 16 x 8, its center (1, 0.5) cells from the place, its size (4, 2) cells.
    boxes = torch.tensor([[4, 10, 20, 18], [0, 0, 4, 2]], dtype=torch.float64)
    want = torch.tensor(
        [
            [(0.5 + 0.25) / 2, (1 + 3) / 2, 0, (0 + 0.25) / 2],
            # At (2, 1) of 4 x 2: (0.5, 0.25) from its place, a size of (1, 0.5).
            [(0.5 + 0.25) / 2, (0 + 0.5) / 2, (2 + 0) / 2, (0.5 + 0.25) / 2],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(Centers(refined=True).costs(NUMBERS, ANCHORS, boxes), want)
    torch.testing.assert_close(Centers().costs(NUMBERS, ANCHORS, boxes), want[:, :3])


@pytest.mark.parametrize("refined", [False, True])
def test_the_box_itself_costs_nothing_and_gradients_are_right(refined):
    form = Centers(refined)
    torch.manual_seed(0)
    numbers = torch.rand(2, form.per_place, dtype=torch.float64) + 0.5
    if refined:
        numbers[:, 6:] = numbers[:, :2]
    numbers[:, 4:6] = numbers[:, 2:4]
    boxes = form.decode(numbers, ANCHORS)
    assert form.costs(numbers, ANCHORS, boxes).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: form.costs(x, ANCHORS, boxes + 1), (numbers + 0.01).requires_grad_())


def test_no_places():
    assert Centers().decode(NUMBERS[:0], ANCHORS[:0]).shape == (0, 4)
    assert Centers().costs(NUMBERS[:0], ANCHORS[:0], ANCHORS[:0]).shape == (0, 3)
