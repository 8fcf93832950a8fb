import pytest
import torch
from torch import nn
from torch.nn import functional

from dyhead.layers import PConv, SampledPConv
from dyhead.layers.pconv import LevelConv, normalize
from dyhead.ops import pyramid_deform_conv2d

SIZES = [(9, 13), (1, 1), (2, 1), (7, 1), (1, 6)]


def convolution(conv, x, level):
    """A convolution of the block as the paper says it, from torch's convolution and torchvision's deformable one."""
    deform_conv2d = pytest.importorskip("torchvision").ops.deform_conv2d
    if conv.offset is None or level == 0:
        return functional.conv2d(x, conv.weight, conv.bias, conv.stride, padding=1)
    offset = functional.conv2d(x, conv.offset.weight, conv.offset.bias, conv.stride, padding=1)
    out = deform_conv2d(x, offset, conv.weight, stride=conv.stride, padding=1)
    return out + conv.bias[:, None, None]


def pyramid_convolution(block, levels):
    """The sums of a block, level by level, before its norm."""
    out = []
    for m, level in enumerate(levels):
        terms = [convolution(block.same, level, m)]
        if m > 0:
            terms.append(convolution(block.finer, levels[m - 1], m))
        if m < len(levels) - 1:
            coarse = convolution(block.coarser, levels[m + 1], m)
            terms.append(functional.interpolate(coarse, level.shape[2:], mode="bilinear", align_corners=True))
        out.append(torch.stack(terms).sum(0))
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_levels", [1, 2, 5])
@pytest.mark.parametrize("deformable", [False, True])
def test_is_three_convolutions_of_three_levels(make_pyramid, randomize, deformable, num_levels, size):
    block = randomize(PConv(4, deformable=deformable).double())
    levels = make_pyramid(*size, levels=num_levels, channels=4)
    for ours, theirs in zip(block(levels), pyramid_convolution(block, levels), strict=True):
        torch.testing.assert_close(ours, theirs.relu(), rtol=1e-10, atol=1e-10)


def test_a_case_computed_by_hand():
    """Kernels of one number, in their middle: 2 for the same level, 100 for the finer and 10 for the coarser one."""
    block = PConv(1)
    for conv, value in ((block.same, 2.0), (block.finer, 100.0), (block.coarser, 10.0)):
        nn.init.zeros_(conv.weight).data[0, 0, 1, 1] = value
    nn.init.constant_(block.same.bias, 0.5)
    fine = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, -99]])
    coarse = torch.tensor([[1.0, 3], [5, 7]])
    # With corners aligned, [[1, 3], [5, 7]] becomes [[1, 2, 3], [3, 4, 5], [5, 6, 7]] at 3 x 3.
    # Finest level, its last pixel: 2 * -99 + 10 * 7 + 0.5 = -127.5, and 0 after ReLU.
    want_fine = torch.tensor([[12.5, 24.5, 36.5], [38.5, 50.5, 62.5], [64.5, 76.5, 0]])
    # Coarser level: every second pixel of the finer one, [[1, 3], [7, -99]], times 100, and twice itself.
    want_coarse = torch.tensor([[102.5, 306.5], [710.5, 0]])
    got = block([fine[None, None], coarse[None, None]])
    assert torch.equal(got[0][0, 0], want_fine)
    assert torch.equal(got[1][0, 0], want_coarse)


def test_offsets_start_as_a_plain_convolution(make_pyramid):
    block, plain = PConv(4, deformable=True).double(), PConv(4).double()
    missing, unexpected = plain.load_state_dict(block.state_dict(), strict=False)
    assert missing == []
    assert all(".offset." in key for key in unexpected)
    levels = make_pyramid(9, 13, levels=4, channels=4)
    for ours, theirs in zip(block(levels), plain(levels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_offsets_move_what_is_read_on_all_levels_but_the_finest(make_pyramid, randomize):
    block = randomize(PConv(4, deformable=True).double())
    levels = make_pyramid(9, 13, levels=3, channels=4)
    before = block(levels)
    for conv in (block.same, block.finer, block.coarser):
        nn.init.constant_(conv.offset.bias, 0.7)
    changed = [not torch.equal(a, b) for a, b in zip(before, block(levels), strict=True)]
    assert changed == [False, True, True]


@pytest.mark.parametrize("kind", [lambda: PConv(3, deformable=True, norm="BN"), lambda: SampledPConv(3, norm="BN")])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(make_pyramid, randomize, kind, training):
    block = randomize(kind().double()).train(training)
    levels = [level.requires_grad_() for level in make_pyramid(5, 4, levels=3, channels=3)]
    parameters = list(block.parameters())

    def outputs(*inputs):
        return tuple(block(list(inputs[:3])))

    assert torch.autograd.gradcheck(outputs, (*levels, *parameters), fast_mode=True)


def test_one_normalization_has_the_statistics_of_all_levels(make_pyramid):
    norm = nn.BatchNorm2d(4).double()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    # A level counts by its pixels.
    levels = [(i + 1) * level + 3 * i for i, level in enumerate(make_pyramid(7, 5, channels=4))]
    pixels = [level.transpose(0, 1).flatten(1) for level in levels]
    together = torch.cat(pixels, dim=1)
    mean, var = together.mean(1), together.var(1, unbiased=False)
    shape = (1, 4, 1, 1)
    for got, level in zip(normalize(norm, levels), levels, strict=True):
        want = (level - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        torch.testing.assert_close(got, want * norm.weight.view(shape) + norm.bias.view(shape))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * together.var(1))
    assert norm.num_batches_tracked == 1

    norm.eval()
    stored = [x.clone().view(shape) for x in (norm.running_mean, norm.running_var)]
    for got, level in zip(normalize(norm, levels), levels, strict=True):
        want = (level - stored[0]) / (stored[1] + 1e-5).sqrt()
        torch.testing.assert_close(got, want * norm.weight.view(shape) + norm.bias.view(shape))
    assert torch.equal(norm.running_mean, stored[0].flatten())


@pytest.mark.parametrize("kind", [PConv, SampledPConv])
def test_the_norm_comes_before_the_relu(make_pyramid, randomize, kind):
    block = randomize(kind(4, norm="BN").double())
    plain = kind(4).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    levels = make_pyramid(9, 13, levels=3, channels=4)
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyhead.layers.pconv.normalize", lambda norm, levels: sums.extend(levels) or levels)
        plain(levels)
    for ours, theirs in zip(block(levels), normalize(block.norm, sums), strict=True):
        torch.testing.assert_close(ours, theirs.relu())
    assert min(level.min() for level in sums) < 0


def test_one_pixel_of_one_level_has_statistics_of_the_other_levels(make_pyramid):
    levels = make_pyramid(2, 2, levels=2, channels=4, batch=1)
    assert all(level.isfinite().all() for level in PConv(4, norm="BN").double()(levels))


@pytest.mark.parametrize("num_levels", [1, 2, 5])
def test_the_sampled_variant_is_a_sum_over_levels_of_single_calls(make_pyramid, randomize, num_levels):
    block = randomize(SampledPConv(4).double())
    levels = make_pyramid(9, 13, levels=num_levels, channels=4)
    for m, ours in enumerate(block(levels)):
        offset = functional.conv2d(levels[m], block.offset.weight, block.offset.bias, padding=1)
        total = block.bias[:, None, None]
        for source in range(max(m - 1, 0), min(m + 2, num_levels)):
            kernel = block.weight[1 + source - m][None]
            total = total + pyramid_deform_conv2d([levels[source]], offset, kernel, scales=[2.0 ** (m - source)])
        torch.testing.assert_close(ours, total.relu(), rtol=1e-10, atol=1e-10)


def test_the_sampled_variant_is_a_plain_convolution_on_one_level(make_pyramid):
    (level,) = make_pyramid(7, 5, levels=1, channels=4)
    block = SampledPConv(4).double()
    torch.testing.assert_close(
        block([level])[0], functional.conv2d(level, block.weight[1], block.bias, padding=1).relu()
    )


def test_the_sampled_variant_is_another_function(make_pyramid):
    block, sampled = PConv(4).double(), SampledPConv(4).double()
    with torch.no_grad():
        for kernel, conv in zip(sampled.weight, (block.finer, block.same, block.coarser), strict=True):
            kernel.copy_(conv.weight)
    levels = make_pyramid(8, 12, levels=2, channels=4)
    assert not any(torch.allclose(a, b) for a, b in zip(block(levels), sampled(levels), strict=True))


def test_levels_whose_sizes_are_rounded_down_are_for_the_sampled_variant_alone(make_pyramid):
    levels = [*make_pyramid(9, 12, levels=1), *make_pyramid(4, 6, levels=1)]
    with pytest.raises(
        ValueError, match=r"level 1: expected half the size of level 0 \(9 x 12\), rounded up, got 4 x 6"
    ):
        PConv(8).double()(levels)
    assert [level.shape for level in SampledPConv(8).double()(levels)] == [level.shape for level in levels]


@pytest.mark.parametrize("kind", [PConv, SampledPConv])
def test_weights_start_small_and_biases_at_zero(kind):
    block = kind(64)
    weights = [p for key, p in block.named_parameters() if key.endswith("weight") and "offset" not in key]
    assert all(weight.std().item() == pytest.approx(0.01, rel=0.05) for weight in weights)
    others = [p for key, p in block.named_parameters() if key.endswith("bias") or "offset" in key]
    assert not any(p.any() for p in others)


@pytest.mark.parametrize("kind", [PConv, SampledPConv])
def test_arguments_out_of_range_are_refused(kind):
    with pytest.raises(ValueError, match="channels: expected an integer from 1"):
        kind(0)
    with pytest.raises(ValueError, match="norm: expected one of '', 'BN', 'SyncBN', got 'GN'"):
        kind(4, norm="GN")
    assert isinstance(kind(4, norm="SyncBN").norm, nn.SyncBatchNorm)


@pytest.mark.parametrize("deformable", [False, True])
def test_half_precision_has_the_gradients_of_maps_one_pixel_wide(deformable):
    """PyTorch's own convolution of stride 2 leaves memory as it is in some of these."""
    conv = LevelConv(8, stride=2, deformable=deformable)
    x = torch.randn(2, 8, 3, 1)
    conv(x, 1).sum().backward()
    want = {key: p.grad.clone() for key, p in conv.named_parameters()}
    for _ in range(5):
        dirty = [torch.full((8, 8, 3, 3), 1e9, dtype=torch.bfloat16) for _ in range(4)]
        del dirty
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            conv(x, 1).sum().backward()
        for key, p in conv.named_parameters():
            torch.testing.assert_close(p.grad, want[key], rtol=0.02, atol=0.05)
