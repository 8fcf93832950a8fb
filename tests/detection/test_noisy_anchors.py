import math

import pytest
import torch

from dyhead.detection.noisy_anchors import Cleanliness, reweigh, soft_focal_loss


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def scattered(count, seed=0):
    torch.manual_seed(seed)
    return 0.95 * torch.rand(count, dtype=torch.float64), 0.9 * torch.rand(count, dtype=torch.float64)


def test_labels_computed_by_hand():
    # Means 1/2 and 1/4. 3/4 of (0.4, 1, 1.6) plus 1/4 of (2, 0.4, 0.6) are (0.8, 0.85, 1.35); stretched from the lowest
    # to the highest, 0, 1/11 and 1; and so that the lowest is the mean IoU, 1/2 + 1/2 of that.
    labels = Cleanliness().labels(tensor(0.2, 0.5, 0.8), tensor(0.5, 0.1, 0.15))
    torch.testing.assert_close(labels, tensor(0.5, 0.5 + 0.5 / 11, 1.0))


def test_weights_computed_by_hand():
    # 1 / (1 - x) is (2, 4) of the IoUs and (1, 2) of the probabilities; divided by their means, 3 and 3/2, both are
    # (2/3, 4/3), whatever their shares. With probabilities of 0 the second is (1, 1).
    iou = tensor(0.5, 0.75)
    torch.testing.assert_close(Cleanliness().weights(iou, tensor(0.0, 0.5)), tensor(2 / 3, 4 / 3))
    want = tensor(0.75 * 2 / 3 + 0.25, 0.75 * 4 / 3 + 0.25)
    torch.testing.assert_close(Cleanliness().weights(iou, tensor(0.0, 0.0)), want)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_equal_loops(count, alpha):
    iou, confidence = scattered(count)
    rows = list(zip(iou.tolist(), confidence.tolist(), strict=True))
    means = [sum(column) / count for column in zip(*rows, strict=True)]
    clean = [alpha * a / means[0] + (1 - alpha) * b / means[1] for a, b in rows]
    low, high = min(clean), max(clean)
    labels = [means[0] + (1 - means[0]) * (s - low) / (high - low) for s in clean]
    torch.testing.assert_close(Cleanliness(alpha).labels(iou, confidence), tensor(*labels))
    steep = [(1 / (1 - a), 1 / (1 - b)) for a, b in rows]
    means = [sum(column) / count for column in zip(*steep, strict=True)]
    weights = [alpha * a / means[0] + (1 - alpha) * b / means[1] for a, b in steep]
    torch.testing.assert_close(Cleanliness(alpha).weights(iou, confidence), tensor(*weights))


def test_the_range_of_labels_and_the_mean_of_weights():
    iou, confidence = scattered(40, seed=3)
    labels, weights = Cleanliness().labels(iou, confidence), Cleanliness().weights(iou, confidence)
    torch.testing.assert_close(labels.aminmax(), (iou.mean(), tensor(1.0)[0]))
    torch.testing.assert_close(weights.mean(), tensor(1.0)[0])


@pytest.mark.parametrize(
    ("iou", "confidence"),
    [
        ((), ()),
        ((0.4,), (0.2,)),
        ((0.4, 0.4, 0.4), (0.2, 0.2, 0.2)),
        ((0.0, 0.0), (0.3, 0.1)),
        ((0.0, 0.0), (0.0, 0.0)),
        ((1.0, 1.0), (1.0, 1.0)),
        ((1.0, 0.2), (0.3, 1.0)),
    ],
)
def test_where_means_or_ranges_are_0_or_weights_infinite(iou, confidence):
    for dtype in (torch.float32, torch.float64):
        parts = torch.tensor(iou, dtype=dtype), torch.tensor(confidence, dtype=dtype)
        labels, weights = Cleanliness().labels(*parts), Cleanliness().weights(*parts)
        assert labels.shape == weights.shape == parts[0].shape
        assert ((labels >= 0) & (labels <= 1)).all()
        assert (weights.isfinite() & (weights > 0)).all()
        if len(set(zip(iou, confidence, strict=True))) == 1:
            assert torch.equal(labels, torch.ones_like(labels))
            torch.testing.assert_close(weights, torch.ones_like(weights))


def test_weights_are_limited():
    # At most 1 / (1 - 0.9) = 10, of a mean of (10 + 2) / 2.
    weights = Cleanliness(alpha=1.0, largest=0.9).weights(tensor(1.0, 0.5), tensor(0.0, 0.0))
    torch.testing.assert_close(weights, tensor(10 / 6, 2 / 6))


def test_nothing_is_differentiated_through_them():
    iou, confidence = (part.requires_grad_() for part in scattered(5))
    assert not Cleanliness().labels(iou, confidence).requires_grad
    assert not Cleanliness().weights(iou, confidence).requires_grad


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 2.0), (0.25, 1.5), (0.5, 0.0)])
def test_soft_focal_loss_by_loops(alpha, gamma):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64).round(decimals=1)
    want = []
    for logit, y in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        of_object = -alpha * y * (1 - p) ** gamma * math.log(p)
        want.append(of_object - (1 - alpha) * (1 - y) * p**gamma * math.log(1 - p))
    torch.testing.assert_close(soft_focal_loss(logits, labels, alpha, gamma), tensor(*want).view(5, 4))
    assert torch.autograd.gradcheck(lambda x: soft_focal_loss(x, labels, alpha, gamma), logits.requires_grad_())


def test_soft_focal_loss_of_huge_logits_is_finite():
    logits = torch.tensor([-1000.0, -90.0, 90.0, 1000.0], requires_grad=True)
    for label in (0.0, 0.5, 1.0):
        (gradient,) = torch.autograd.grad(soft_focal_loss(logits, torch.full_like(logits, label)).sum(), logits)
        assert gradient.isfinite().all()


def test_reweighing_keeps_the_sum_and_not_the_gradient():
    # 1 + 3 = 4; weighed 2 + 3 = 5: the factor is 4/5, the gradients of the values are 2 and 1 times it.
    losses = tensor(1.0, 3.0).requires_grad_()
    weighed = reweigh(losses, tensor(2.0, 1.0))
    torch.testing.assert_close(weighed, tensor(8 / 5, 12 / 5))
    weighed.sum().backward()
    torch.testing.assert_close(losses.grad, tensor(8 / 5, 4 / 5))


@pytest.mark.parametrize("losses", [(), (0.0, 0.0)])
def test_reweighing_nothing_gives_no_nan(losses):
    losses = tensor(*losses).requires_grad_()
    weighed = reweigh(losses, torch.ones_like(losses))
    assert weighed.sum() == 0
    weighed.sum().backward()
    assert losses.grad.isfinite().all()
