import math

import pytest
import torch

from dyhead.detection.losses import GaussianFocalLoss


def by_loops(logits, targets, alpha, beta):
    total = 0.0
    for logit, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= (1 - p) ** alpha * math.log(p) if y == 1 else (1 - y) ** beta * p**alpha * math.log(1 - p)
    return total


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 4.0), (1.5, 0.0), (0.0, 4.0)])
def test_equals_the_formula_by_loops(alpha, beta):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    targets[1, 2] = targets[4, 0] = 1
    targets[0] = 0
    loss = GaussianFocalLoss(alpha, beta)
    assert loss(logits, targets).item() == pytest.approx(by_loops(logits, targets, alpha, beta))
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


def test_by_hand():
    # p is 1/2 everywhere: ln(2)/4 at the object, 0.9^4 = 0.6561 of it beside, all of it far away.
    cost = GaussianFocalLoss()(torch.zeros(3), torch.tensor([1.0, 0.1, 0.0]))
    assert cost.item() == pytest.approx(0.6931472 / 4 * (1 + 0.6561 + 1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_the_gradient_of_huge_logits_is_finite_and_does_not_end(alpha):
    logits = torch.tensor([-1000.0, -90.0, 90.0, 1000.0], requires_grad=True)
    for target, wrong in ((0.0, slice(2, 4)), (0.5, slice(2, 4)), (1.0, slice(0, 2))):
        (gradient,) = torch.autograd.grad(GaussianFocalLoss(alpha)(logits, torch.full_like(logits, target)), logits)
        assert gradient.isfinite().all()
        assert (gradient[wrong].abs() > 0.05).all()


def test_no_places():
    logits = torch.zeros(0, 3, requires_grad=True)
    cost = GaussianFocalLoss()(logits, torch.zeros(0, 3))
    cost.backward()
    assert cost == 0
    assert logits.grad.shape == (0, 3)
