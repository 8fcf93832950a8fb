"""Blocks that studies compare DyHead's with."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from dyhead.layers import DyHead


@pytest.fixture
def variants():
    return importlib.import_module("benchmarks.variants")


def test_hes_kernels_pass_nothing_unchanged_and_all_else_is_dyheads(variants):
    torch.manual_seed(0)
    head = variants.VariantOptions(num_blocks=2, initialization="he").build(64)
    assert [type(block) for block in head.blocks] == [type(block) for block in DyHead(64, 2).blocks]
    for block in head.blocks:
        for kernel in block.spatial_attention.weight:
            assert kernel.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
            assert kernel[range(64), range(64), 1, 1].mean().abs() < 0.05
    same = variants.VariantOptions(num_blocks=1).build(64).blocks[0].spatial_attention.weight[1]
    assert same[range(64), range(64), 1, 1].mean().item() == pytest.approx(1, abs=0.05)


def test_kernels_without_noise_pass_the_input_on(variants):
    options = variants.VariantOptions(num_blocks=1, noise=0.0, norm="", task_aware=False, scale_aware=False)
    levels = [torch.randn(1, 16, 6, 8), torch.randn(1, 16, 3, 4)]
    # Importances start at 1/2, and each level's window is both levels.
    for out, level in zip(options.build(16)(levels), levels, strict=True):
        torch.testing.assert_close(out, level / 4)
    with pytest.raises(ValueError, match="noise: expected none beside initialization .he., .*got 0.0"):
        variants.VariantOptions(num_blocks=1, noise=0.0, initialization="he").build(16)


def test_the_factor_of_offsets_is_that_of_their_steps_under_adam(variants):
    torch.manual_seed(0)
    level, moved = torch.randn(1, 16, 6, 8), []
    for factor in (1.0, 0.1):
        torch.manual_seed(1)
        options = variants.VariantOptions(num_blocks=1, offset_factor=factor, zero_init_offset=False)
        attention = options.build(16).blocks[0].spatial_attention
        before, _ = attention.offset_and_mask(level, None)
        optimizer = torch.optim.Adam(attention.parameters(), lr=0.001)
        before.square().mean().backward()
        optimizer.step()
        moved.append((before.detach(), attention.offset_and_mask(level, None)[0].detach() - before.detach()))
    (start, whole), (same, part) = moved
    torch.testing.assert_close(same, start)
    torch.testing.assert_close(part, whole * 0.1, rtol=1e-2, atol=1e-5)


def test_scale_weights_leave_their_limits_again_only_with_a_gradient(variants):
    levels = [torch.ones(1, 16, 6, 8), torch.ones(1, 16, 3, 4)]
    steps = {}
    for scale in ("hard", "through", "leaky", "relu"):
        attention = variants.VariantOptions(num_blocks=1, scale=scale).build(16).blocks[0].scale_attention
        for bias in (-2.0, 0.5, 2.0):
            torch.nn.init.constant_(attention.f.bias, bias)
            weights = attention(levels)
            low = 0.5 if scale == "relu" else 0.0
            assert weights.tolist() == [[min(max((bias + 1) / 2, low), 1)] * 2]
            steps[scale, bias] = [
                torch.autograd.grad(sign * weights.sum(), attention.f.bias, retain_graph=True)[0].item()
                for sign in (1, -1)
            ]
    # A step is against the gradient: both levels' halves, where they may move.
    assert steps["hard", -2.0] == steps["hard", 2.0] == steps["relu", -2.0] == steps["relu", 2.0] == [0, 0]
    assert steps["through", -2.0] == [0, -1]
    assert steps["through", 2.0] == [1, 0]
    assert steps["leaky", -2.0] == steps["leaky", 2.0] == pytest.approx([0.1, -0.1])
    for scale in ("hard", "through", "leaky", "relu"):
        assert steps[scale, 0.5] == [1, -1]


def test_a_norm_of_inputs_undoes_their_scale(variants):
    torch.manual_seed(0)
    head = variants.VariantOptions(num_blocks=1, norm_groups=4, input_norm=True).build(16)
    pyramid = {"p3": torch.randn(2, 16, 6, 8), "p4": torch.randn(2, 16, 3, 4)}
    got = head({"p3": pyramid["p3"] * 30 + 2, "p4": pyramid["p4"]})
    assert got.keys() == pyramid.keys()
    normed = {name: F.group_norm(level, 4) for name, level in pyramid.items()}
    for name, level in head.blocks[0](normed).items():
        torch.testing.assert_close(got[name], level, rtol=1e-4, atol=1e-4)


def test_norms_of_branches_come_before_the_sum(variants):
    torch.manual_seed(0)
    attention = variants.NormOfBranches(16, norm_groups=4)
    for norm in attention.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    fine, coarse = torch.randn(2, 16, 6, 8), torch.randn(2, 16, 3, 4)
    weight = torch.tensor([[0.5, 0.0], [2.0, 0.0]])

    def same(x, scale):
        # At the start nothing moves and every importance is 1/2.
        norm = attention.norms[1]
        return F.group_norm(F.conv2d(x, attention.weight[1], padding=1) / 2, 4, norm.weight, norm.bias) * scale

    (alone,) = attention([fine])
    torch.testing.assert_close(alone, same(fine, 1), rtol=1e-4, atol=1e-4)
    # A level of weight 0 adds nothing, where a norm of the sum would undo the other's weight.
    got, _ = attention([fine, coarse], weight)
    torch.testing.assert_close(got, same(fine, weight[:, 0, None, None, None]) / 2, rtol=1e-4, atol=1e-4)


def test_a_head_with_norms_of_branches_trains(variants):
    head = variants.VariantOptions(num_blocks=1, norm_place="branches", norm_groups=4).build(16)
    out = head([torch.randn(1, 16, 6, 8), torch.randn(1, 16, 3, 4)])
    sum(level.square().mean() for level in out).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_convolutions_are_a_tower_of_every_level(variants):
    torch.manual_seed(0)
    neck = variants.ConvolutionsOptions(depth=2, norm_groups=4).build(8, 2)
    pyramid = {"p3": torch.randn(2, 8, 6, 4), "p4": torch.randn(2, 8, 3, 2)}
    out = neck(pyramid)
    parameters = list(neck.parameters())
    assert len(parameters) == 8
    for name, x in pyramid.items():
        for weight, bias, gain, shift in (parameters[:4], parameters[4:]):
            x = F.relu(F.group_norm(F.conv2d(x, weight, bias, padding=1), 4, gain, shift))
        torch.testing.assert_close(out[name], x)
