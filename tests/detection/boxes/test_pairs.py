import pytest
import torch

from dyhead.detection.boxes import DeltaPairs, Deltas
from tests.detection.objects import make_boxes


@pytest.mark.parametrize("loss", ["smooth_l1", "giou"])
@pytest.mark.parametrize("own", [True, False])
def test_each_box_is_one_of_deltas_from_an_anchor_of_its_own_or_from_the_same(loss, own):
    options = ((2.0, 3.0, 4.0, 5.0), loss, 0.3)
    pairs, single = DeltaPairs(*options), Deltas(*options)
    anchors, others = (make_boxes(6, 50, 60, seed=seed, smallest=9) for seed in (0, 1))
    boxes = torch.cat([make_boxes(6, 50, 60, seed=seed, smallest=9) for seed in (2, 3)], dim=1)
    numbers = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    second = others if own else anchors
    places = torch.cat([anchors, others], dim=1) if own else anchors
    want = [single.decode(numbers[:, :4], anchors), single.decode(numbers[:, 4:], second)]
    torch.testing.assert_close(pairs.decode(numbers, places), torch.cat(want, dim=1))
    want = [single.loss(numbers[:, :4], anchors, boxes[:, :4]), single.loss(numbers[:, 4:], second, boxes[:, 4:])]
    torch.testing.assert_close(pairs.loss(numbers, places, boxes), torch.stack(want, dim=1))
    assert pairs.decode(numbers[:0], places[:0]).shape == (0, 8)
    assert pairs.loss(numbers[:0], places[:0], boxes[:0]).shape == (0, 2)
