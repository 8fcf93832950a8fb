import numpy as np
import pytest
import torch
from torch.nn import functional

from dyhead.layers import SpatialAwareAttention


def equation_4(attention, levels, level_weight, window, strides=(1, 2, 4, 8)):
    """Eq. 4 as the paper writes it, one place at a time, and GroupNorm from its definition."""
    num_levels, (batch, channels) = len(levels), levels[0].shape[:2]
    weight = attention.weight.detach().numpy()
    out = []
    for m in range(num_levels):
        median = levels[m] * torch.from_numpy(level_weight[:, m])[:, None, None, None]
        x = functional.conv2d(median, attention.offset.weight, attention.offset.bias, padding=1).detach().numpy()
        groups = x.shape[1] // 27
        offset, mask = x[:, : 18 * groups], 1 / (1 + np.exp(-x[:, 18 * groups :]))
        height, width = levels[m].shape[2:]
        seen = [source for source in range(num_levels) if window is None or abs(source - m) <= window]
        total = np.zeros((batch, channels, height, width))
        for source in seen:
            kernel = weight[1 + np.sign(source - m)]
            level = levels[source].numpy() * level_weight[:, source, None, None, None]
            rows, columns = np.arange(level.shape[2]), np.arange(level.shape[3])
            scale = strides[m] / strides[source]
            for n, i, j, k, g in np.ndindex(batch, height, width, 9, groups):
                # The centre of the pixel that the tap points at, in image coordinates of a unit of a level-m pixel.
                centre_y = i + k // 3 - 1 + offset[n, 18 * g + 2 * k, i, j] + 0.5
                centre_x = j + k % 3 - 1 + offset[n, 18 * g + 2 * k + 1, i, j] + 0.5
                y, x = scale * centre_y - 0.5, scale * centre_x - 0.5
                hat = np.maximum(0, 1 - abs(rows - y))[:, None] * np.maximum(0, 1 - abs(columns - x))[None, :]
                part = slice(g * channels // groups, (g + 1) * channels // groups)
                sample = (level[n, part] * hat).sum((1, 2)) * mask[n, 9 * g + k, i, j]
                total[n, :, i, j] += kernel[:, part, k // 3, k % 3] @ sample / len(seen)
        grouped = total.reshape(batch, attention.norm.num_groups, -1)
        grouped = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
        gain, shift = (p.detach().numpy()[:, None, None] for p in (attention.norm.weight, attention.norm.bias))
        out.append(grouped.reshape(total.shape) * gain + shift)
    return out


@pytest.mark.parametrize("window", [1, 2, None])
@pytest.mark.parametrize("offset_groups", [1, 2])
def test_is_equation_4(make_pyramid, randomize, window, offset_groups):
    attention = SpatialAwareAttention(4, window=window, offset_groups=offset_groups, norm_groups=2).double()
    randomize(attention)
    levels = make_pyramid(7, 5, levels=4, channels=4)
    level_weight = torch.rand(2, 4, dtype=torch.float64)
    result = attention(levels, level_weight)
    for ours, theirs in zip(result, equation_4(attention, levels, level_weight.numpy(), window), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        (((12, 8), (3, 2)), (1, 4)),  # a level is left out
        (((5, 4), (5, 4), (3, 2)), (1, 1, 2)),  # two of one stride, as of a dilated backbone
        (((10, 12), (4, 5), (3, 3)), (1, 2, 4)),  # halves less or more a pixel, as convolutions without padding leave
        (((9, 10), (6, 7)), (1, np.sqrt(9 / 6 * 10 / 7))),  # the same part of the image in other pixels
        (((7, 5), (1, 1)), (1, 6)),
    ],
)
def test_levels_that_are_no_halves_have_the_strides_of_their_sizes(randomize, sizes, strides):
    attention = randomize(SpatialAwareAttention(4, window=None, norm_groups=2).double())
    levels = [torch.randn(1, 4, *size, dtype=torch.float64) for size in sizes]
    level_weight = torch.rand(1, len(sizes), dtype=torch.float64)
    expected = equation_4(attention, levels, level_weight.numpy(), None, strides)
    for ours, theirs in zip(attention(levels, level_weight), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9, atol=1e-9)


def test_batch_norm_has_the_statistics_of_all_levels_and_images(make_pyramid, randomize):
    attention = randomize(SpatialAwareAttention(4, norm="BN").double())
    levels = make_pyramid(7, 5, channels=4)
    sums = attention(levels, norm=False)
    pixels = torch.cat([x.movedim(1, 0).flatten(1) for x in sums], dim=1)  # (C, pixels)
    mean, variance = pixels.mean(1), pixels.var(1, correction=0)

    def normed(mean, variance):
        scale = attention.norm.weight / (variance + 1e-5).sqrt()
        return [(x - mean[:, None, None]) * scale[:, None, None] + attention.norm.bias[:, None, None] for x in sums]

    torch.testing.assert_close(attention(levels), normed(mean, variance))
    kept = 0.1 * mean, 0.9 + 0.1 * pixels.var(1)
    torch.testing.assert_close((attention.norm.running_mean, attention.norm.running_var), kept)
    torch.testing.assert_close(attention.eval()(levels), normed(*kept))
    assert isinstance(torch.nn.SyncBatchNorm.convert_sync_batchnorm(attention).norm, torch.nn.SyncBatchNorm)


def test_without_a_norm_sums_go_out(make_pyramid):
    attention = SpatialAwareAttention(4, norm=None).double()
    levels = make_pyramid(7, 5, channels=4)
    assert all(torch.equal(a, b) for a, b in zip(attention(levels), attention(levels, norm=False), strict=True))
    assert not any(name.startswith("norm") for name in attention.state_dict())


def test_without_level_weights_levels_count_the_same(make_pyramid, randomize):
    attention = randomize(SpatialAwareAttention(8, norm_groups=2).double())
    levels = make_pyramid(7, 5)
    for a, b in zip(attention(levels), attention(levels, torch.ones(2, 3, dtype=torch.float64)), strict=True):
        torch.testing.assert_close(a, b)


def test_level_weights_are_those_levels_multiplied(make_pyramid, randomize):
    attention = randomize(SpatialAwareAttention(8, norm_groups=2).double())
    levels = make_pyramid(7, 5)
    weight = torch.rand(2, 3, dtype=torch.float64)
    weighed = [level * weight[:, i, None, None, None] for i, level in enumerate(levels)]
    for a, b in zip(attention(levels, weight), attention(weighed), strict=True):
        torch.testing.assert_close(a, b)


def test_sees_its_window_and_nothing_else(make_pyramid, randomize):
    levels = make_pyramid(16, 16, levels=5)
    disturbed = [*levels[:4], levels[4] + torch.randn_like(levels[4])]

    def changed(window):
        attention = randomize(SpatialAwareAttention(8, window=window, norm_groups=2).double())
        return [not torch.equal(a, b) for a, b in zip(attention(levels), attention(disturbed), strict=True)]

    assert changed(1) == [False, False, False, True, True]
    assert changed(None) == [True] * 5


def test_starts_as_a_convolution_where_the_levels_are(make_pyramid):
    attention = SpatialAwareAttention(8, norm_groups=2).double()
    (level,) = make_pyramid(6, 9, levels=1)
    (result,) = attention([level])
    torch.testing.assert_close(result, attention.norm(functional.conv2d(level, attention.weight[1], padding=1) / 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_groups": 3}, "norm_groups: expected a divisor of the 8 channels, got 3"),
        ({"norm_groups": 16}, "norm_groups: expected a divisor of the 8 channels, got 16"),
        ({"norm_groups": 2, "offset_groups": 5}, "offset_groups: expected a divisor of the 8 channels, got 5"),
        ({"norm_groups": 2, "window": 0}, "window: expected at least 1, or None"),
    ],
)
def test_names_a_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialAwareAttention(8, **options)
