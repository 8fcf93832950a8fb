"""The box head of the paper's two-stage form, against Eq. 5 a region at a time."""

import math

import pytest
import torch

from dyhead.detection.roi import BOX_HEADS, DyHeadBoxHead, register_box_head


def randomized(head):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return head


def attended(region, theta):
    """Eq. 5 of one region, a list of channels, each a list of its cells; ``theta`` as in TaskAwareAttention."""
    first, _, second, norm = theta
    pooled = [sum(cells) / len(cells) for cells in region]

    def linear(layer, x):
        rows, bias = layer.weight.tolist(), layer.bias.tolist()
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, bias, strict=True)]

    numbers = linear(second, [max(v, 0) for v in linear(first, pooled)])
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in numbers) / len(numbers) + norm.eps)
    t = [
        2 / (1 + math.exp(-((v - mean) / deviation * gain + shift))) - 1
        for v, gain, shift in zip(numbers, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    ]
    c = len(region)
    return [
        [max((1 + t[k]) * x + t[2 * c + k] / 2, t[c + k] * x + t[3 * c + k] / 2) for x in cells]
        for k, cells in enumerate(region)
    ]


@pytest.mark.parametrize("attentions", [1, 2])
def test_is_equation_5_of_each_region_by_itself(attentions):
    head = randomized(DyHeadBoxHead(8, side=3, num_attentions=attentions).double())
    regions = torch.randn(4, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = head(regions)
    for region, features in zip(regions, out, strict=True):
        want = region.flatten(1).tolist()
        for attention in head.attentions:
            want = attended(want, attention.theta)
        torch.testing.assert_close(features, torch.tensor(want, dtype=torch.float64).flatten())
    torch.testing.assert_close(head(regions[2:3]), out[2:3])  # whatever other regions there are


def test_the_configuration_chooses_the_number_of_attentions():
    built = BOX_HEADS["DyHeadBoxHead"].options(num_attentions=3).build(8, 5)
    assert (len(built.attentions), built.out_features) == (3, 200)


def test_no_regions_give_no_features_and_gradients_of_zero():
    head = DyHeadBoxHead(8, side=3)
    features = head(torch.zeros(0, 8, 3, 3))
    assert features.shape == (0, head.out_features)
    features.sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((6, 3), "reduction: expected a divisor of the 6 channels, got 4"), ((8, 3, 0), "num_attentions: .* got 0")],
)
def test_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        DyHeadBoxHead(*arguments)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="box head 'DyHeadBoxHead': registered before"):
        register_box_head("DyHeadBoxHead", "MODEL.OTHER")(dict)
    assert BOX_HEADS["DyHeadBoxHead"].node == "MODEL.DYHEAD_BOX_HEAD"
