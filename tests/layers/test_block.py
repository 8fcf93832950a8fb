import itertools

import pytest
import torch

from dyhead.layers import DyHeadBlock

SWITCHES = ("scale_aware", "spatial_aware", "task_aware")


def block_with(full, norm="GN", **switches):
    """A block with some attentions switched off and the parameters of ``full`` in the others."""
    block = DyHeadBlock(8, norm=norm, norm_groups=2, **switches).double()
    block.load_state_dict({k: v for k, v in full.state_dict().items() if k in block.state_dict()})
    return block


@pytest.mark.parametrize("on", [on for n in range(4) for on in itertools.combinations(SWITCHES, n)])
@pytest.mark.parametrize("norm", ["GN", "BN", None])
def test_is_the_composition_of_the_attentions_that_are_on(make_pyramid, randomize, on, norm):
    full = randomize(DyHeadBlock(8, norm=norm, norm_groups=2).double())
    levels = make_pyramid(13, 10)
    result = block_with(full, norm, **{switch: switch in on for switch in SWITCHES})(levels)

    expected = levels
    for single in on:  # scale, then space, then task
        expected = block_with(full, norm, **{switch: switch == single for switch in SWITCHES})(expected)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_with_everything_off_is_the_identity(make_pyramid):
    levels = make_pyramid(6, 5)
    block = DyHeadBlock(8, **dict.fromkeys(SWITCHES, False))
    assert all(a is b for a, b in zip(block(levels), levels, strict=True))
    assert not list(block.parameters())


def test_a_shortcut_adds_what_comes_in(make_pyramid, randomize):
    plain = randomize(DyHeadBlock(8, norm_groups=2).double())
    levels = make_pyramid(13, 10)
    result = block_with(plain, shortcut=True)(levels)
    for x, y, out in zip(levels, plain(levels), result, strict=True):
        torch.testing.assert_close(out, x + y)


def test_scale_alone_multiplies_the_levels(make_pyramid, randomize):
    block = DyHeadBlock(8, spatial_aware=False, task_aware=False).double()
    randomize(block)
    levels = make_pyramid(6, 5)
    weight = block.scale_attention(levels)
    for i, (level, out) in enumerate(zip(levels, block(levels), strict=True)):
        for n in range(2):
            torch.testing.assert_close(out[n], weight[n, i] * level[n])


def test_gradients_reach_every_parameter_and_level_from_the_start(make_pyramid):
    block = DyHeadBlock(16, norm_groups=4).double()
    levels = [level.requires_grad_() for level in make_pyramid(13, 10, channels=16)]
    sum((out * torch.randn_like(out)).sum() for out in block(levels)).backward()
    for name, tensor in [*block.named_parameters(), *((f"level {i}", level) for i, level in enumerate(levels))]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


def test_gradients_are_those_of_finite_differences(make_pyramid, randomize):
    block = randomize(DyHeadBlock(4, norm_groups=2).double(), std=0.2)
    levels = [level.requires_grad_() for level in make_pyramid(3, 3, channels=4, levels=2, batch=1)]
    torch.nn.init.zeros_(block.scale_attention.f.bias)
    # Where a scale-aware weight is 0 or 1, its gradient is not the function's.
    assert all(0 < weight < 1 for weight in block.scale_attention(levels).flatten())
    assert torch.autograd.gradcheck(lambda *x: tuple(block(list(x))), levels)
