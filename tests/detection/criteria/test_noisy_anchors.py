import pytest
import torch

from dyhead.detection import Predictions, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.criteria.noisy_anchors import Cleanliness, reweigh
from dyhead.detection.noisy_anchors import NoisyAnchorsOptions
from tests.detection.objects import iou, make_boxes


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


SHAPES, ANCHORS = [(6, 8), (3, 4)], AnchorOptions(((24.0, 32.0), (48.0, 64.0)), ((0.5, 1.0),), 0.5)


def make_case(*counts):
    options = NoisyAnchorsOptions(num_classes=3, in_features=("p3", "p4"), loss_normalizer="positives")
    detector = options.build(4, [8, 16], anchors=ANCHORS).double()
    generator = torch.Generator().manual_seed(0)
    places = sum(h * w for h, w in SHAPES) * detector.anchors.per_cell
    logits, deltas = (
        torch.randn(len(counts), places, numbers, generator=generator, dtype=torch.float64).requires_grad_()
        for numbers in (3, 4)
    )
    boxes = [make_boxes(count, 48, 64, seed=i, smallest=12) for i, count in enumerate(counts)]
    targets = [Targets(box, torch.arange(len(box)) % 3) for box in boxes]
    return detector, Predictions(logits, 0.3 * deltas, None, SHAPES), targets, (logits, deltas)


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses_and_gradients_by_loops(counts):
    detector, predictions, targets, leaves = make_case(*counts)
    anchors = detector.places(predictions).anchors
    assigned = detector.assign(detector.places(predictions), targets).tolist()
    of_class, of_box = [], []  # (loss, weight) of each place and class, and of each positive place
    for image, target in enumerate(targets):
        positives = [place for place, owner in enumerate(assigned[image]) if owner >= 0]
        overlap, sure = [], []
        for place in positives:
            owner = assigned[image][place]
            decoded = detector.box_form.decode(predictions.boxes[image, [place]], anchors[[place]])[0]
            overlap.append(iou(decoded.tolist(), target.boxes[owner].tolist()))
            sure.append(predictions.logits[image, place, target.labels[owner]].sigmoid().item())
        labels = dict(zip(positives, Cleanliness().labels(tensor(*overlap), tensor(*sure)).tolist(), strict=True))
        weights = dict(zip(positives, Cleanliness().weights(tensor(*overlap), tensor(*sure)).tolist(), strict=True))
        for place, owner in enumerate(assigned[image]):
            for k in range(3):
                y = labels[place] if owner >= 0 and target.labels[owner] == k else 0.0
                p = predictions.logits[image, place, k].sigmoid()
                loss = -0.5 * (y * (1 - p) ** 2 * p.log() + (1 - y) * p**2 * (1 - p).log())
                of_class.append((loss, weights.get(place, 1.0)))
            if owner >= 0:
                loss = detector.box_form.loss(
                    predictions.boxes[image, [place]], anchors[[place]], target.boxes[[owner]]
                )
                of_box.append((loss[0], weights[place]))

    divisor, values, surrogate = max(len(of_box), 1), [], 0.0
    for losses in (of_class, of_box):
        plain = sum(loss.item() for loss, _ in losses)
        weighed = sum(loss.item() * weight for loss, weight in losses)
        values.append(plain / divisor)
        surrogate = surrogate + sum(loss * weight * plain / weighed for loss, weight in losses) / divisor
    want = torch.autograd.grad(surrogate, leaves, retain_graph=True, allow_unused=True)

    losses = detector.losses(predictions, targets)
    assert [losses["loss_cls"].item(), losses["loss_box_reg"].item()] == pytest.approx(values)
    got = torch.autograd.grad(sum(losses.values()), leaves)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if expected is None else expected)


def test_boxes_equal_to_their_objects_have_finite_gradients():
    # Deltas that decode to the objects themselves: IoUs of 1, in whose weights the authors' code divides by 0.
    detector, predictions, targets, _ = make_case(1)
    positive = detector.assign(detector.places(predictions), targets)[0] >= 0
    anchors = detector.places(predictions).anchors[positive]
    numbers = predictions.boxes.detach().clone()
    numbers[0, positive] = detector.box_form.encode(targets[0].boxes.expand(len(anchors), -1), anchors)
    predictions = predictions._replace(boxes=numbers.requires_grad_())
    losses = detector.losses(predictions, targets)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"].item() == pytest.approx(0.0, abs=1e-12)
    assert numbers.grad.isfinite().all()
