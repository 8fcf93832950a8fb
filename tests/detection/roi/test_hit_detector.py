"""The box head that Hit-Detector found; the authors' numbers of it are compared in tests/backbones."""

import pytest
import torch

from dyhead.detection.roi import BOX_HEADS, HitDetectorHead


def test_the_configuration_chooses_features_and_norm():
    head = BOX_HEADS["HitDetectorHead"].options(fc_dim=12, norm="BN").build(4, 5)
    assert head.out_features == 12
    assert head.fc.weight.shape == (12, 4 * 25)
    assert [type(cell.project.norm) for cell in head.cells] == [torch.nn.BatchNorm2d] * 4


def test_a_region_does_not_see_others_in_evaluation():
    torch.manual_seed(0)
    head = HitDetectorHead(4, side=3, fc_dim=8).double().eval()
    regions = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(head(regions[2:3]), head(regions)[2:3])
    assert not torch.allclose(head(regions)[0], head(regions)[1])


@pytest.mark.parametrize("count", [0, 1])
def test_no_regions_or_one_can_be_learned_from(count):
    head = HitDetectorHead(4, side=2, fc_dim=8).train()
    features = head(torch.randn(count, 4, 2, 2))
    assert features.shape == (count, 8)
    features.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 1}, "side: expected at least 2 cells, got 1"),
        ({"fc_dim": 0}, "fc_dim: expected an integer from 1 .* got 0"),
        ({"norm": "GN"}, "norm: expected one of 'BN', 'SyncBN', 'FrozenBN', got 'GN'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HitDetectorHead(**{"channels": 4, "side": 3} | arguments)
