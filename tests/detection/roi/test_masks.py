"""Masks in regions, against loops over pixels and cells."""

import math

import pytest
import torch

from dyhead.detection.roi.masks import crop_masks, mask_loss, mask_probabilities, paste_masks


def test_a_cell_of_a_region_is_of_the_object_where_half_of_it_is():
    masks = torch.zeros(2, 12, 16, dtype=torch.bool)
    masks[0, 2:8, 3:9] = True
    masks[1, :, 8:] = True
    boxes, objects = torch.tensor([[1.0, 0, 13, 12], [0, 0, 16, 12], [0, 0, 16, 12]]), torch.tensor([0, 1, 0])
    cropped = crop_masks(masks, boxes, objects, side=4)
    for mask, (x0, y0, x1, y1), out in zip(masks[objects], boxes.int().tolist(), cropped, strict=True):
        width, height = (x1 - x0) // 4, (y1 - y0) // 4
        for i in range(4):
            for j in range(4):
                cell = mask[y0 + i * height : y0 + (i + 1) * height, x0 + j * width : x0 + (j + 1) * width]
                assert out[i, j] == (cell.float().mean() >= 0.5)
    assert crop_masks(masks[:0], boxes[:0], objects[:0], side=4).shape == (0, 4, 4)


@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_is_the_mean_cross_entropy_of_the_own_class(classes):
    logits = torch.randn(2, classes, 3, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0])
    targets = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    total = 0.0
    for own, label, target in zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True):
        for row, wanted in zip(own[label if classes > 1 else 0], target, strict=True):
            for x, is_object in zip(row, wanted, strict=True):
                total += math.log(1 + math.exp(-x if is_object else x))
    loss = mask_loss(logits, labels, targets)
    assert loss.item() == pytest.approx(total / 18, rel=1e-6)
    of_one = mask_probabilities(logits, labels)[0, 1, 2].item()
    assert of_one == pytest.approx(1 / (1 + math.exp(-logits[0, 2 if classes > 1 else 0, 1, 2].item())))
    nothing = mask_loss(logits[:0], labels[:0], targets[:0])
    nothing.backward()
    assert nothing == 0
    assert (logits.grad == 0).all()


def interpolated(mask, y, x):
    """Between the centers of cells, and 0 around them; y and x in cells."""
    total = 0.0
    for i in (math.floor(y - 0.5), math.floor(y - 0.5) + 1):
        for j in (math.floor(x - 0.5), math.floor(x - 0.5) + 1):
            if 0 <= i < len(mask) and 0 <= j < len(mask[0]):
                total += mask[i][j] * (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j))
    return total


def test_pasted_masks_are_interpolated_at_every_pixel():
    masks = torch.rand(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) ** 0.5
    masks[4] = 1
    boxes = torch.tensor(
        [[2.3, 1.1, 9.7, 8.9], [-4.2, 3, 30, 17.5], [6, 6, 6.4, 6.3], [40, 40, 50, 50], [3, 2, 7, 6]],
        dtype=torch.float64,
    )
    pasted = paste_masks(masks, boxes, 14, 20)
    assert pasted.shape == (5, 14, 20)
    for mask, (x0, y0, x1, y1), out in zip(masks.tolist(), boxes.tolist(), pasted.tolist(), strict=True):
        for y in range(14):
            for x in range(20):
                at = (y + 0.5 - y0) / (y1 - y0) * 4, (x + 0.5 - x0) / (x1 - x0) * 4
                assert out[y][x] == (interpolated(mask, *at) >= 0.5)
    assert pasted[4].sum() == 16  # a box of whole pixels
    assert paste_masks(masks[:1], torch.tensor([[5.0, 5, 5, 9]], dtype=torch.float64), 14, 20).sum() == 0
    assert paste_masks(masks[:0], boxes[:0], 14, 20).shape == (0, 14, 20)
