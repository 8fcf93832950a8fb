import inspect

import pytest
import torch
from torch import nn
from torchvision import ops
from torchvision.ops import deform_conv2d

from dyhead.layers import DeformConv2d, DeformConv2dPack


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("modulated", [False, True])
def test_samples_as_torchvision_does(modulated):
    layer = DeformConv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
    x, offset, mask = noise(2, 8, 9, 11), 2 * noise(2, 36, 5, 6), noise(2, 18, 5, 6).sigmoid() if modulated else None
    # torchvision takes the groups from the shapes, too
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, (2, 2), (2, 2), (2, 2), mask)
    torch.testing.assert_close(layer(x, offset, mask), expected, rtol=1e-4, atol=1e-5)


def test_takes_the_place_of_torchvisions_layer():
    theirs = ops.DeformConv2d(8, 12, (3, 1), 2, (2, 1), 2, 4, True)
    ours = DeformConv2d(8, 12, (3, 1), 2, (2, 1), 2, 4, True)
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    assert list(inspect.signature(DeformConv2d).parameters) == list(inspect.signature(ops.DeformConv2d).parameters)
    ours.load_state_dict(theirs.state_dict())
    x, offset = noise(1, 8, 9, 11), noise(1, 6, 5, 7)
    torch.testing.assert_close(ours(input=x, offset=offset), theirs(input=x, offset=offset), rtol=1e-4, atol=1e-5)


def test_names_a_padding_in_words():
    with pytest.raises(ValueError, match="padding: expected an integer or two .*, got 'same'"):
        DeformConv2d(8, 8, 3, padding="same")


def test_takes_half_offsets_under_autocast():
    layer, x, offset = DeformConv2d(8, 8, 3, padding=1), noise(1, 8, 6, 7), noise(1, 18, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, offset.bfloat16(), offset[:, :9].bfloat16())
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=offset[:, :9])
    assert (out.float() - expected).square().mean().sqrt() < 0.05


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_pack_starts_as_the_convolution_in_whose_place_it_is(modulated, groups):
    conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    layer = DeformConv2dPack(conv, modulated=modulated, offset_groups=2)
    x = noise(1, 8, 9, 12)
    torch.testing.assert_close(layer(x), conv(x) * (0.5 if modulated else 1), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.weight is conv.weight
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_pack_reads_where_its_offsets_say():
    layer = DeformConv2dPack(nn.Conv2d(2, 2, 3, padding=1, bias=False), modulated=True)
    with torch.no_grad():
        layer.weight.copy_(nn.init.dirac_(torch.empty(2, 2, 3, 3)))
        layer.offset.bias[8:10] = torch.tensor([1.0, -2.0])  # dy and dx of the tap in the middle
        layer.offset.bias[18 + 4] = 20.0  # its importance is 1
    x = noise(1, 2, 6, 7)
    expected = torch.zeros_like(x)
    expected[:, :, :-1, 2:] = x[:, :, 1:, :-2]
    torch.testing.assert_close(layer(x), expected)


def test_groups_of_offsets_divide_the_channels():
    with pytest.raises(ValueError, match="offset_groups: expected a divisor of 8 channels, got 3"):
        DeformConv2dPack(nn.Conv2d(8, 8, 3), offset_groups=3)
