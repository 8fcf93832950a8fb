import math

import pytest
import torch
from torch.nn import functional

from dyhead.detection.losses import CLASS_LOSSES, FocalLoss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 1.5), (-1, 2.0), (0.0, 1.0), (1.0, 1.0)])
def test_equals_the_papers_formula(alpha, gamma):
    torch.manual_seed(0)
    logits = 3 * torch.randn(7, 4, dtype=torch.float64)
    targets = (torch.rand(7, 4) < 0.3).double()
    want = 0.0
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        p_t = p if target else 1 - p
        weight = 1 if alpha == -1 else alpha if target else 1 - alpha
        want -= weight * (1 - p_t) ** gamma * math.log(p_t)
    got = FocalLoss(alpha, gamma)(logits, targets)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_without_weights_it_is_binary_cross_entropy():
    logits, targets = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    want = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    torch.testing.assert_close(FocalLoss(-1, 0)(logits, targets), want)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_extreme_logits_have_finite_losses_and_gradients(target):
    logits = torch.tensor([[-1000.0, -90.0, 0.0, 90.0, 1000.0]], requires_grad=True)
    cost = FocalLoss()(logits, torch.full_like(logits, target))
    cost.backward()
    assert cost.isfinite()
    assert logits.grad.isfinite().all()


def test_no_places_cost_nothing_and_have_a_gradient():
    logits = torch.zeros(0, 3, requires_grad=True)
    cost = FocalLoss()(logits, torch.zeros(0, 3))
    assert cost == 0
    cost.backward()
    assert logits.grad.shape == (0, 3)


def test_it_is_the_loss_called_focal():
    assert CLASS_LOSSES["focal"] is FocalLoss
