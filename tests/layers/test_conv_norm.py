import pytest
import torch

from dyhead.layers.conv_norm import NORMS, ConvNorm, normalize
from dyhead.layers.inverted_residual import InvertedResidual, SeparableConv


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_sizes_are_divided_by_the_stride_and_rounded_up(stride, dilation, width):
    layer = ConvNorm(4, 6, 5, "BN", stride=stride, dilation=dilation)
    x = torch.randn(2, 4, 9, width)
    assert layer(x).shape == (2, 6, -(-9 // stride), -(-width // stride))
    torch.testing.assert_close(layer.eval()(x), layer.norm(layer.conv(x)))


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_one_value_of_a_channel_is_normalized_by_the_running_statistics(norm):
    layer = NORMS[norm](3).train()
    layer.running_mean.copy_(torch.tensor([1.0, 2, 3]))
    layer.running_var.fill_(4.0)
    layer.weight.data.fill_(3.0)
    layer.bias.data.fill_(0.5)
    x = torch.tensor([5.0, 4, 3]).reshape(1, 3, 1, 1).requires_grad_()
    out = normalize(layer, x)
    torch.testing.assert_close(out.flatten(), torch.tensor([6.5, 3.5, 0.5]), rtol=0, atol=1e-5)
    out.sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.full((3,), 1.5), rtol=0, atol=1e-5)
    assert layer.running_mean.tolist() == [1, 2, 3]
    several = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(normalize(layer, several).mean(dim=0).flatten(), torch.full((3,), 0.5))


def test_what_has_other_channels_is_not_added():
    x = torch.randn(1, 4, 5, 5)
    for outputs, stride, added in ((4, 1, True), (6, 1, False), (4, 2, False)):
        block = InvertedResidual(4, outputs, 3, 2, "BN", stride=stride).eval()
        inside = block.project(block.depthwise(block.expand(x).relu()).relu())
        torch.testing.assert_close(block(x), x + inside if added else inside)
    for outputs, added in ((4, True), (6, False)):
        block = SeparableConv(4, outputs, 3, "BN").eval()
        inside = block.project(block.spatial(x).relu())
        torch.testing.assert_close(block(x), x + inside if added else inside)
        assert block.spatial.conv.groups == 4
