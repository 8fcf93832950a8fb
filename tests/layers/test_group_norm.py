import pytest
import torch
from torch import nn

from dyhead.layers.group_norm import affine_of_group_norm
from dyhead.ops.channelwise import channel_statistics


@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_is_group_norm(groups, mean):
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, 12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    # Channels of a group differ in mean and spread.
    levels = [
        torch.randn(2, 12, size, 9) * (0.5 + torch.rand(12, 1, 1)) + torch.randn(12, 1, 1) + mean for size in (5, 40)
    ]
    affine = affine_of_group_norm(
        torch.stack([channel_statistics(level) for level in levels], dim=1),
        norm.weight, norm.bias, norm.num_groups, norm.eps,
    )  # fmt: skip
    for i, level in enumerate(levels):
        result = level * affine.slope[:, i, :, None, None] + affine.intercept[:, i, :, None, None]
        expected = norm.double()(level.double())
        norm.float()
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * (1 + mean))
        torch.testing.assert_close(affine.mean[:, i].double(), expected.mean((2, 3)), rtol=0, atol=1e-5 * (1 + mean))


def test_plain_and_compiled_blocks_are_the_same(monkeypatch, make_pyramid, randomize):
    from dyhead.layers import DyHead
    from dyhead.ops import channelwise

    for block in ("paper", "released"):
        head = randomize(DyHead(16, 2, block=block).double(), std=0.1)
        levels = [level.requires_grad_() for level in make_pyramid(9, 8, channels=16)]
        runs = []
        for compiled in (True, False):
            monkeypatch.setattr(channelwise, "_is_compiled_for", lambda x, compiled=compiled: compiled)
            out = head(levels)
            runs.append([*out, *torch.autograd.grad(sum(level.square().sum() for level in out), levels)])
        torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
