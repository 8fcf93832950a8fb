"""The box head of two branches, against each branch a region at a time."""

import pytest
import torch

from dyhead.detection.roi import BOX_HEADS, DecoupledBoxHead


def branch(region, layers):
    x = region
    for layer in layers:
        rows, bias = layer.weight.tolist(), layer.bias.tolist()
        x = [max(sum(w * v for w, v in zip(row, x, strict=True)) + b, 0) for row, b in zip(rows, bias, strict=True)]
    return x


@pytest.mark.parametrize("num_fc", [1, 2])
def test_each_branch_sees_all_cells_through_layers_of_its_own(num_fc):
    head = BOX_HEADS["DecoupledBoxHead"].options(num_fc=num_fc, fc_dim=5).build(2, 3).double()
    assert isinstance(head, DecoupledBoxHead)
    assert (len(head.class_fcs), len(head.box_fcs), head.out_features) == (num_fc, num_fc, (5, 5))
    for layer in (*head.class_fcs, *head.box_fcs):
        torch.nn.init.normal_(layer.bias)
    regions = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for region, features in zip(regions, head(regions), strict=True):
        cells = region.flatten().tolist()
        want = branch(cells, head.class_fcs) + branch(cells, head.box_fcs)
        torch.testing.assert_close(features, torch.tensor(want, dtype=torch.float64))
    assert head(regions[:0]).shape == (0, 10)
