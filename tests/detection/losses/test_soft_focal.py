import math

import pytest
import torch

from dyhead.detection.losses import FocalLoss, SoftFocalLoss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 2.0), (0.25, 1.5), (0.5, 0.0)])
def test_equals_the_formula_by_loops(alpha, gamma):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64).round(decimals=1)
    want = []
    for logit, y in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        of_object = -alpha * y * (1 - p) ** gamma * math.log(p)
        want.append(of_object - (1 - alpha) * (1 - y) * p**gamma * math.log(1 - p))
    loss, want = SoftFocalLoss(alpha, gamma), torch.tensor(want, dtype=torch.float64).view(5, 4)
    torch.testing.assert_close(loss.each(logits, labels), want)
    torch.testing.assert_close(loss(logits, labels), want.sum())
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


def test_the_gradient_of_huge_logits_is_finite():
    logits = torch.tensor([-1000.0, -90.0, 90.0, 1000.0], requires_grad=True)
    for label in (0.0, 0.5, 1.0):
        (gradient,) = torch.autograd.grad(SoftFocalLoss()(logits, torch.full_like(logits, label)), logits)
        assert gradient.isfinite().all()


def test_towards_hard_labels_it_is_focal_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    torch.testing.assert_close(SoftFocalLoss(0.25, 2.0)(logits, targets), FocalLoss(0.25, 2.0)(logits, targets))
