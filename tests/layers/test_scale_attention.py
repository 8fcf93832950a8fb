import numpy as np
import torch

from dyhead.layers import ScaleAwareAttention


def test_is_equation_3(make_pyramid, randomize):
    attention = randomize(ScaleAwareAttention(8).double(), std=2.0)
    levels = make_pyramid(9, 7)
    result = attention(levels).detach()

    weight, bias = attention.f.weight[0].detach().numpy(), attention.f.bias.item()
    expected = np.empty((2, 3))
    for image in range(2):
        for level in range(3):
            x = levels[level][image].numpy()
            pooled = [x[c].sum() / (x.shape[1] * x.shape[2]) for c in range(8)]
            f = sum(weight[c] * pooled[c] for c in range(8)) + bias
            expected[image, level] = max(0, min(1, (f + 1) / 2))
    assert 0 < np.median(expected) < 1
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12)


def test_weighs_an_image_and_a_level_by_themselves(make_pyramid, randomize):
    attention = randomize(ScaleAwareAttention(8).double())
    levels = make_pyramid(8, 8)
    before = attention(levels)
    levels[1][0] += 0.2
    changed = attention(levels) != before
    assert changed.tolist() == [[False, True, False], [False, False, False]]


def test_starts_open_with_a_slope(make_pyramid):
    attention = ScaleAwareAttention(8).double()
    weights = attention(make_pyramid(8, 8))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.9))
    weights.sum().backward()
    assert attention.f.weight.grad.abs().min() > 0
