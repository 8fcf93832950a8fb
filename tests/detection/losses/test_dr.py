import math

import pytest
import torch

from dyhead.detection.losses import DRLoss

NEGATIVE = 0.1 / math.log(3.5)


def by_loops(logits, targets, lambda_positive=1.0, lambda_negative=NEGATIVE, sharpness=6.0, tau=4.0, margin=0.5):
    pairs = list(zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True))
    sigmoid = {True: lambda s: 1 / (1 + math.exp(-s)), False: lambda s: math.exp(s) / (1 + math.exp(s))}
    means = {}
    for true, sign, temperature in ((True, -1, lambda_positive), (False, 1, lambda_negative)):
        found = [sigmoid[logit >= 0](logit) for logit, target in pairs if (target > 0) == true]
        weights = [math.exp(sign * p / temperature) for p in found]
        means[true] = sum(w * p for w, p in zip(weights, found, strict=True)) / sum(weights) if found else float(true)
    return tau / sharpness * math.log(1 + math.exp(sharpness * (means[False] - means[True] + margin)))


def test_at_a_prior_of_one_half_it_is_4_6ths_of_ln_1_plus_e_cubed():
    targets = torch.zeros(5, 3)
    targets[2, 1] = 1
    loss = DRLoss()(torch.zeros(5, 3), targets)
    torch.testing.assert_close(loss, torch.tensor(4 / 6 * math.log(1 + math.exp(3))))  # 2.03


def test_computed_by_hand():
    # Probabilities 1/4 and 3/4 among positives and negatives. With a temperature of 1/2 / ln 3 the weights of the
    # negatives are as exp(1/2 / temperature) = 3 to 1, those of the positives as 1 to 3: P- = 1/4 * 1/4 + 3/4 * 3/4 =
    # 5/8 and P+ = 3/4 * 1/4 + 1/4 * 3/4 = 3/8. With L = 4/3 ln 3 the exponent is L (5/8 - 3/8 + 1/2) = ln 3, and with
    # tau = L the loss is ln(1 + 3).
    third = math.log(3)
    loss = DRLoss(0.5 / third, 0.5 / third, 4 / 3 * third, 4 / 3 * third)
    logits = torch.tensor([[third, -third], [third, -third]])
    torch.testing.assert_close(loss(logits, torch.tensor([[1.0, 1.0], [0, 0]])), torch.tensor(math.log(4)))


def scattered(places, classes, share, spread=2.0):
    torch.manual_seed(0)
    return spread * torch.randn(places, classes, dtype=torch.float64), (torch.rand(places, classes) < share).double()


INPUTS = {
    "few positives": scattered(20, 4, 0.05),
    "many positives": scattered(20, 4, 0.5),
    "one class": scattered(60, 1, 0.2),
    "no positives": scattered(10, 3, 0.0),
    "no negatives": scattered(10, 3, 1.0),
    "all equal": scattered(10, 3, 0.3, spread=0.0),
    "far apart": scattered(20, 4, 0.3, spread=100.0),
    "nothing": scattered(0, 3, 0.0),
}


@pytest.mark.parametrize("options", [{}, {"lambda_positive": 0.3, "lambda_negative": 0.2, "tau": 2.0, "margin": 0.1}])
@pytest.mark.parametrize("name", INPUTS)
def test_equals_the_definition_by_loops(name, options):
    logits, targets = INPUTS[name]
    want = torch.tensor(by_loops(logits, targets, **options), dtype=torch.float64)
    torch.testing.assert_close(DRLoss(**options)(logits, targets), want)


@pytest.mark.parametrize("sharpness", [6.0, 1.0])
@pytest.mark.parametrize("name", ["few positives", "many positives", "no positives", "no negatives", "one class"])
def test_its_gradient_is_that_of_finite_differences(name, sharpness):
    logits, targets = INPUTS[name]
    loss = DRLoss(sharpness=sharpness)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.clone().requires_grad_())


def test_negatives_far_below_the_worst_are_pushed_up():
    # The weights are differentiated: dP-/dp = q (1 + (p - P-) / lambda).
    logits = torch.tensor([[3.0, -1.0], [2.0, 2.0]], requires_grad=True)
    DRLoss()(logits, torch.tensor([[1.0, 0], [0, 0]])).backward()
    assert logits.grad[0, 0] < 0
    assert logits.grad[0, 1] < 0
    assert (logits.grad[1] > 0).all()
