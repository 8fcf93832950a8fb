import numpy as np
import pytest
import torch

from dyhead.layers import TaskAwareAttention


def test_is_equation_5(make_pyramid, randomize):
    attention = randomize(TaskAwareAttention(8).double(), std=0.7)
    levels = make_pyramid(9, 7)
    result = attention(levels)

    fc1, _, fc2, norm = attention.theta
    w1, c1, w2, c2, gain, shift = (
        p.detach().numpy() for p in (fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm.weight, norm.bias)
    )
    for n in range(2):
        pooled = np.mean([level[n].numpy().mean((1, 2)) for level in levels], axis=0)
        theta = w2 @ np.maximum(w1 @ pooled + c1, 0) + c2
        theta = (theta - theta.mean()) / np.sqrt(theta.var() + 1e-5) * gain + shift
        t = 2 / (1 + np.exp(-theta)) - 1
        for level, out in zip(levels, result, strict=True):
            x, out = level[n].numpy(), out[n].detach().numpy()
            for c in range(8):
                first = (1 + t[c]) * x[c] + t[16 + c] / 2
                second = t[8 + c] * x[c] + t[24 + c] / 2
                np.testing.assert_allclose(out[c], np.maximum(first, second), rtol=1e-10, atol=1e-12)


def test_starts_close_to_relu(make_pyramid):
    levels = make_pyramid(9, 7, channels=64, dtype=torch.float32)
    for x, out in zip(levels, TaskAwareAttention(64)(levels), strict=True):
        assert (out - x.relu()).abs().max() < 0.2 * x.abs().max()


def test_every_level_counts_the_same_whatever_its_size(make_pyramid, randomize):
    attention = randomize(TaskAwareAttention(8).double())
    levels = make_pyramid(16, 16)
    constant = [level.mean(dim=(2, 3), keepdim=True).expand_as(level) for level in levels]
    swapped = [constant[0], constant[2][:, :, :1, :1].expand_as(constant[1]), constant[1][..., :1, :1]]
    torch.testing.assert_close(attention(constant)[0], attention(swapped)[0])


def test_names_a_wrong_reduction():
    with pytest.raises(ValueError, match="reduction: expected a divisor of the 8 channels, got 3"):
        TaskAwareAttention(8, reduction=3)
