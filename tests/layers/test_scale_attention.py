import numpy as np
import pytest
import torch

from dyhead.layers import ScaleAwareAttention
from dyhead.layers.hard_sigmoid import hard_sigmoid


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


@pytest.mark.parametrize("start", [-3.0, 3.0])
def test_weights_find_back_from_their_limits(make_pyramid, start):
    attention = ScaleAwareAttention(8).double()
    torch.nn.init.constant_(attention.f.bias, start)
    levels = make_pyramid(8, 8)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (attention(levels) - 0.7).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(attention(levels), torch.full((2, 3), 0.7).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_that_lead_further_out_are_not_taken(compiled):
    function = torch.compile(hard_sigmoid, backend="aot_eager", fullgraph=True) if compiled else hard_sigmoid
    x = torch.tensor([-3.0, -1.0, 0.5, 1.0, 3.0], requires_grad=True)
    result = function(x)
    assert result.tolist() == [0, 0, 0.75, 1, 1]
    for sign, expected in ((1, [0, 0.5, 0.5, 0.5, 0.5]), (-1, [-0.5, -0.5, -0.5, -0.5, 0])):
        (gradient,) = torch.autograd.grad(sign * result.sum(), x, retain_graph=True)
        assert gradient.tolist() == expected


def test_derivatives_between_the_limits_are_those_of_the_function():
    x = torch.tensor([-0.9, 0.0, 0.3, 0.9], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(hard_sigmoid, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(hard_sigmoid, x)


def test_forward_mode_has_the_functions_own_derivative_at_the_limits():
    x = torch.tensor([-3.0, 0.0, 3.0])
    for function in (hard_sigmoid, torch.jit.script(hard_sigmoid)):
        value, tangent = torch.func.jvp(function, (x,), (torch.ones(3),))
        assert (value.tolist(), tangent.tolist()) == ([0, 0.5, 1], [0, 0.5, 0])


def test_leaves_nothing_of_its_own_in_graphs():
    class Module(torch.nn.Module):
        def forward(self, x):
            return hard_sigmoid(x)

    x = torch.randn(3, requires_grad=True)
    exported = torch.export.export(Module(), (x,))
    assert {str(node.target) for node in exported.graph.nodes if node.op == "call_function"} == {
        "aten.add.Tensor",
        "aten.div.Tensor",
        "aten.clamp.default",
    }
    assert "HardSigmoid" not in str(torch.jit.trace(Module(), x).inlined_graph)
