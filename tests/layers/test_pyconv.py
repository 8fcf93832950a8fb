"""PyConv against convolutions one by one."""

import pytest
import torch
from torch.nn import functional as F

from dyhead.layers import PyConv2d


@pytest.mark.parametrize("stride", [1, 2])
def test_every_kernel_sees_the_same_map_at_the_same_places(stride):
    torch.manual_seed(0)
    counts = [1, 2, 2]
    layer = PyConv2d(8, [2, 4, 2], kernels=[3, 5, 9], groups=counts, stride=stride, bias=True)
    x = torch.randn(2, 8, 9, 13)
    wide = F.pad(x, [4] * 4)
    expected = []
    for conv, groups, margin in zip(layer.levels, counts, (3, 2, 0), strict=True):
        cut = wide[..., margin : wide.shape[-2] - margin, margin : wide.shape[-1] - margin]
        inputs, kernels = cut.chunk(groups, dim=1), conv.weight.chunk(groups)
        parts = [F.conv2d(a, b, stride=stride) for a, b in zip(inputs, kernels, strict=True)]
        expected.append(torch.cat(parts, dim=1) + conv.bias[:, None, None])
    torch.testing.assert_close(layer(x), torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "kernels", "groups", "message"),
    [
        ([4, 4], [3], [1, 1], "out_channels, kernels, groups: expected as many of each, got 2, 1, 2"),
        ([], [], [], "expected as many of each, got 0, 0, 0"),
        ([4], [4], [1], r"kernels: expected odd sizes, got \[4\]"),
        ([4], [3], [3], "groups"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(channels, kernels, groups, message):
    with pytest.raises(ValueError, match=message):
        PyConv2d(8, channels, kernels, groups)
