import math

import pytest
import torch
from torch.nn import functional

from dyhead.detection.losses import FocalLoss, QualityFocalLoss


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_equals_the_papers_formula(beta):
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, 4, dtype=torch.float64)
    targets = torch.rand(7, 4, dtype=torch.float64) * (torch.rand(7, 4) < 0.3)
    want = 0.0
    for logit, y in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        want += abs(y - p) ** beta * (-(1 - y) * math.log(1 - p) - y * math.log(p))
    got = QualityFocalLoss(beta)(logits, targets)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_by_hand():
    # p = 1/4: with y = 3/4 the weight is (1/2)^2, the cross-entropy -1/4 ln 3/4 - 3/4 ln 1/4.
    logits = torch.tensor([[-math.log(3)]], dtype=torch.float64)
    want = 0.25 * (-0.25 * math.log(0.75) - 0.75 * math.log(0.25))
    got = QualityFocalLoss()(logits, torch.tensor([[0.75]], dtype=torch.float64))
    assert got.item() == pytest.approx(want)


def test_without_weights_it_is_binary_cross_entropy_and_with_targets_0_and_1_focal_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.rand(6, 3)
    want = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    torch.testing.assert_close(QualityFocalLoss(0.0)(logits, targets), want)
    hard = targets.round()
    torch.testing.assert_close(QualityFocalLoss(2.0)(logits, hard), FocalLoss(-1, 2.0)(logits, hard))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_gradients_by_finite_differences(beta):
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 3, dtype=torch.float64) * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: QualityFocalLoss(beta)(x, targets), logits)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_it_is_least_where_the_probability_is_the_target(target):
    logits = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    costs = torch.stack([QualityFocalLoss()(x[None], torch.full_like(x[None], target)) for x in logits])
    assert logits[costs.argmin()].sigmoid().item() == pytest.approx(target, abs=3e-3)
    assert costs.min() < 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_extreme_logits_have_finite_losses_and_gradients(target, beta):
    logits = torch.tensor([[-1000.0, -90.0, 0.0, 90.0, 1000.0]], requires_grad=True)
    cost = QualityFocalLoss(beta)(logits, torch.full_like(logits, target))
    cost.backward()
    assert cost.isfinite()
    assert logits.grad.isfinite().all()


def test_no_places_cost_nothing_and_have_a_gradient():
    logits = torch.zeros(0, 3, requires_grad=True)
    cost = QualityFocalLoss()(logits, torch.zeros(0, 3))
    assert cost == 0
    cost.backward()
    assert logits.grad.shape == (0, 3)
