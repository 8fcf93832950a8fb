import pytest
import torch

from dyhead.detection.boxes import Borders

ANCHORS = torch.tensor([[-4.0, -4, 4, 4], [8, 8, 24, 24]], dtype=torch.float64)  # points at 0, 0 and 16, 16


def test_by_hand():
    """The point 16, 16 of stride 16: distances of 0.5, 0, 1, 2 strides are the box 8, 16, 32, 48, of 24 x 32.

    A shift of 1 is 0.5 of that, 12 across and 16 along; so shifts of -0.5, 0.25, 1, -1 lead to 2, 20, 44, 32. For the
    object 14, 16, 32, 64 they should be 0.5, 0, 0, 1, and cost 1 + 0.25 + 1 + 2.
    """
    numbers = torch.tensor([[0.5, -3.0, 1.0, 2.0, -0.5, 0.25, 1.0, -1.0]], dtype=torch.float64)
    assert Borders().decode_coarse(numbers, ANCHORS[1:]).tolist() == [[8, 16, 32, 48]]
    assert Borders().decode(numbers, ANCHORS[1:]).tolist() == [[2, 20, 44, 32]]
    truth = torch.tensor([[14.0, 16.0, 32.0, 64.0]], dtype=torch.float64)
    assert Borders().loss(numbers, ANCHORS[1:], truth).tolist() == [4.25]
    # In units of the whole box they should be 0.25, 0, 0, 0.5.
    assert Borders(border_delta_std=1.0).loss(numbers, ANCHORS[1:], truth).tolist() == [0.75 + 0.25 + 1 + 1.5]
    # Smooth: a difference d costs d^2 / 4 below 2, else d - 1.
    assert Borders(border_smooth_l1_loss_beta=2.0).loss(numbers, ANCHORS[1:], truth).tolist() == [
        0.25 + 0.015625 + 0.25 + 1
    ]


@pytest.mark.parametrize("std", [0.5, 0.1])
def test_the_loss_is_least_where_the_refined_box_is_the_object(std):
    form = Borders(border_delta_std=std)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(2, 8, generator=generator, dtype=torch.float64) + 0.1
    boxes = form.decode(numbers, ANCHORS)
    torch.testing.assert_close(form.loss(numbers, ANCHORS, boxes), torch.zeros(2, dtype=torch.float64))
    moved = boxes + torch.tensor([0.0, 1.0, 0.0, 0.0])
    height = form.decode_coarse(numbers, ANCHORS)[:, 3] - form.decode_coarse(numbers, ANCHORS)[:, 1]
    torch.testing.assert_close(form.loss(numbers, ANCHORS, moved), 1 / (std * height))


def test_only_shifts_get_a_gradient():
    numbers = torch.full((2, 8), 0.7, dtype=torch.float64, requires_grad=True)
    truth = torch.tensor([[0.0, 0, 9, 9], [9, 9, 30, 40]], dtype=torch.float64)
    Borders().loss(numbers, ANCHORS, truth).sum().backward()
    assert not numbers.grad[:, :4].any()
    assert numbers.grad[:, 4:].all()


def test_without_boxes():
    assert Borders().loss(torch.zeros(0, 8), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert Borders().decode(torch.zeros(0, 8), torch.zeros(0, 4)).shape == (0, 4)
