import math

import pytest
import torch
from torch import nn

from dyhead.detection import Predictions, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.assigners import BACKGROUND
from dyhead.detection.boxes import Distribution
from dyhead.detection.criteria import QualityCriterion
from dyhead.detection.gfl import GFLOptions
from tests.detection.objects import iou, make_boxes

CLASSES, REG_MAX, STRIDES = 2, 3, (8, 16, 32)
SHAPES = [(6, 8), (3, 4), (2, 2)]
NAMES = ("loss_cls", "loss_box_reg", "loss_dfl")


def make_detector(strides=STRIDES, reg_max=REG_MAX, **options):
    options = {"num_classes": CLASSES, "in_features": ("p3", "p4", "p5")[: len(strides)], **options}
    anchors = AnchorOptions(tuple((3 * s,) for s in strides), ((1.0,),), 0.5)
    return GFLOptions(box_form=Distribution(reg_max), **options).build(4, strides, anchors=anchors)


def make_predictions(images, shapes=SHAPES, reg_max=REG_MAX, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = sum(h * w for h, w in shapes)
    logits = torch.randn(images, places, CLASSES, generator=generator, dtype=dtype) - 1
    boxes = torch.randn(images, places, 4 * (reg_max + 1), generator=generator, dtype=dtype)
    return Predictions(logits, boxes, None, shapes)


def make_targets(*boxes, dtype=torch.float64):
    boxes = [torch.as_tensor(box, dtype=dtype).reshape(-1, 4) for box in boxes]
    return [Targets(box, torch.arange(len(box)) % CLASSES) for box in boxes]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(x):
    powers = [math.exp(value) for value in x]
    return [power / sum(powers) for power in powers]


def losses_by_loops(detector, predictions, targets, frozen=None, beta=2.0, box_weight=2.0, distribution_weight=0.25):
    """The three losses, place by place; ``frozen`` predictions give IoUs and weights, which have no gradient."""
    frozen = predictions if frozen is None else frozen
    places = detector.places(predictions)
    centers, strides = places.centers.tolist(), places.by_level(STRIDES[: len(places.counts)]).tolist()
    assigned = detector.assign(places, targets).tolist()
    n = detector.box_form.reg_max

    def decode(numbers, place):
        probabilities = [softmax(numbers[side * (n + 1) : (side + 1) * (n + 1)]) for side in range(4)]
        left, top, right, bottom = (strides[place] * sum(i * p for i, p in enumerate(side)) for side in probabilities)
        x, y = centers[place]
        return [x - left, y - top, x + right, y + bottom], probabilities

    of_class = of_box = of_distribution = total = 0.0
    for image, target in enumerate(targets):
        for place, owner in enumerate(assigned[image]):
            quality = 0.0
            if owner >= 0:
                box = target.boxes[owner].tolist()
                quality = iou(decode(frozen.boxes[image, place].tolist(), place)[0], box)
                weight = max(map(sigmoid, frozen.logits[image, place].tolist()))
                total += weight
                predicted, probabilities = decode(predictions.boxes[image, place].tolist(), place)
                overlap = iou(predicted, box)
                areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (predicted, box))
                union = areas / (1 + overlap)
                around = math.prod(max(predicted[i + 2], box[i + 2]) - min(predicted[i], box[i]) for i in (0, 1))
                of_box += weight * (1 - overlap + (around - union) / around)
                x, y = centers[place]
                for p, distance in zip(probabilities, (x - box[0], y - box[1], box[2] - x, box[3] - y), strict=True):
                    d = min(distance / strides[place], n - 0.1)
                    i = int(d)
                    of_distribution -= weight * ((i + 1 - d) * math.log(p[i]) + (d - i) * math.log(p[i + 1])) / 4
            for k, logit in enumerate(predictions.logits[image, place].tolist()):
                p = sigmoid(logit)
                y = quality if owner >= 0 and target.labels[owner].item() == k else 0.0
                of_class -= abs(y - p) ** beta * ((1 - y) * math.log(1 - p) + y * math.log(p))
    divisor = sum(max(sum(owner >= 0 for owner in row), 1) for row in assigned)
    total = max(total, 1)
    return dict(
        zip(NAMES, (of_class / divisor, box_weight * of_box / total, distribution_weight * of_distribution / total),
            strict=True)
    )  # fmt: skip


def positives(detector, predictions, targets):
    return (detector.assign(detector.places(predictions), targets) >= 0).sum().item()


def test_by_hand():
    """One level of stride 8 and three cells around (4, 4), (12, 4) and (20, 4); two objects, at the first and the last.

    All sides have the probabilities (1/4, 1/2, 1/4) of 0, 1 and 2 strides, so that the boxes are (-4, -4, 12, 12) and
    (12, -4, 28, 12). The first object is (-4, 0, 12, 12) of class 1: the IoU is 16 * 12 / 16^2 = 3/4, 1 - GIoU = 1/4.
    The sides of this object are 1, 1/2, 1, 1 strides away, which costs ln 2 (1 + 3/2 + 1 + 1) / 4 = 9/8 ln 2. The last
    is its box, of class 0: IoU 1, 1 - GIoU = 0, and a distribution loss of ln 2.
    """
    detector = make_detector((8,), reg_max=2)
    detector.assigner = lambda places, boxes: torch.tensor([0, BACKGROUND, 1])
    ln2, ln3 = math.log(2), math.log(3)
    predictions = Predictions(
        torch.tensor([[[0, -ln3], [0, 0], [ln3, 0]]], dtype=torch.float64),  # (1/2, 1/4), (1/2, 1/2), (3/4, 1/2)
        torch.tensor([0, ln2, 0] * 4, dtype=torch.float64).expand(1, 3, 12),
        None,
        [(1, 3)],
    )
    boxes = torch.tensor([[-4, 0, 12, 12], [12, -4, 28, 12]], dtype=torch.float64)
    losses = detector.losses(predictions, [Targets(boxes, torch.tensor([1, 0]))])
    # Both weights: 1/2 and 3/4, 5/4 in all.
    assert losses["loss_box_reg"].item() == pytest.approx(2 * (1 / 2 * 1 / 4 + 3 / 4 * 0) / (5 / 4))
    assert losses["loss_dfl"].item() == pytest.approx(0.25 * (1 / 2 * 9 / 8 + 3 / 4 * 1) * ln2 / (5 / 4))
    # |3/4 - 1/4|^2 times the cross-entropy of 3/4 and 1/4; (1/2)^2 ln 2 for the four classes of probability 1/2; and
    # |1 - 3/4|^2 times -ln 3/4.
    first = 1 / 4 * (-1 / 4 * math.log(3 / 4) - 3 / 4 * math.log(1 / 4))
    want = (first + 4 * 1 / 4 * ln2 - 1 / 16 * math.log(3 / 4)) / 2
    assert losses["loss_cls"].item() == pytest.approx(want)


CASES = {
    "some": [make_boxes(4, 48, 64, seed=1, smallest=10), make_boxes(2, 48, 64, seed=2, smallest=10)],
    "many": [make_boxes(15, 48, 64, seed=3, smallest=6)],
    "none in one image": [make_boxes(3, 48, 64, seed=4, smallest=12), []],
    "none at all": [[], []],
    "smaller than a cell": [[[18.0, 17.0, 22.5, 21.0]]],
    "at the border": [[[0.0, 0.0, 64.0, 48.0], [40.0, 30.0, 64.0, 48.0], [0.0, 12.0, 9.0, 40.0]]],
}


@pytest.mark.parametrize("case", CASES)
def test_by_loops(case):
    targets = make_targets(*CASES[case])
    detector, predictions = make_detector(), make_predictions(len(targets))
    got = {name: loss.item() for name, loss in detector.losses(predictions, targets).items()}
    assert got == pytest.approx(losses_by_loops(detector, predictions, targets), rel=1e-6)
    assert list(got) == list(NAMES)
    count = positives(detector, predictions, targets)
    assert (count > 0) == ("none at all" not in case)
    assert (got["loss_box_reg"] > 0) == (got["loss_dfl"] > 0) == (count > 0)


def test_one_weak_place_is_not_divided_by_less_than_1():
    targets, detector = make_targets([[18.0, 17.0, 22.5, 21.0]]), make_detector()
    predictions = make_predictions(1)
    predictions = predictions._replace(logits=predictions.logits - 5)
    assert positives(detector, predictions, targets) == 1
    got = {name: loss.item() for name, loss in detector.losses(predictions, targets).items()}
    assert got == pytest.approx(losses_by_loops(detector, predictions, targets), rel=1e-6)
    assert got["loss_box_reg"] < 0.05


@pytest.mark.parametrize("shapes", [[(1, 1)], [(2, 1), (1, 1), (1, 1)]])
def test_levels_of_one_cell_by_loops(shapes):
    detector = make_detector(STRIDES[: len(shapes)])
    predictions, targets = make_predictions(1, shapes), make_targets([[0.0, 0.0, 16.0, 20.0]])
    got = {name: loss.item() for name, loss in detector.losses(predictions, targets).items()}
    assert got == pytest.approx(losses_by_loops(detector, predictions, targets), rel=1e-6)
    assert positives(detector, predictions, targets) > 0


def test_weights_of_the_losses_are_options():
    targets, predictions = make_targets(*CASES["some"]), make_predictions(2)
    detector = make_detector(criterion=QualityCriterion(0.5, 3.0))
    got = {name: loss.item() for name, loss in detector.losses(predictions, targets).items()}
    want = losses_by_loops(detector, predictions, targets, box_weight=0.5, distribution_weight=3.0)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("case", ["some", "none in one image"])
def test_gradients_by_finite_differences(case):
    """Where IoUs as targets of classes, and weights of boxes, stay as they are."""
    targets = make_targets(*CASES[case])
    detector, predictions = make_detector(), make_predictions(2)
    leaves = [part.clone().requires_grad_() for part in predictions[:2]]
    sum(detector.losses(Predictions(*leaves, None, SHAPES), targets).values()).backward()
    image, place = (detector.assign(detector.places(predictions), targets) >= 0).nonzero()[0].tolist()
    step = 1e-5
    for kind, at in [(0, (image, place, 0)), (0, (image, place, 1)), (0, (1, 0, 0))] + [
        (1, (image, place, number)) for number in range(0, 4 * (REG_MAX + 1), 3)
    ]:
        costs = []
        for sign in (1, -1):
            moved = [part.clone() for part in predictions[:2]]
            moved[kind][at] += sign * step
            costs.append(
                sum(losses_by_loops(detector, Predictions(*moved, None, SHAPES), targets, predictions).values())
            )
        assert leaves[kind].grad[at].item() == pytest.approx((costs[0] - costs[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_boxes_of_background_have_no_gradient_and_scores_none_from_boxes():
    targets, detector, predictions = make_targets(*CASES["some"]), make_detector(), make_predictions(2)
    leaves = [part.clone().requires_grad_() for part in predictions[:2]]
    losses = detector.losses(Predictions(*leaves, None, SHAPES), targets)
    background = detector.assign(detector.places(predictions), targets) < 0
    of_boxes = torch.autograd.grad(
        losses["loss_box_reg"] + losses["loss_dfl"], leaves, retain_graph=True, allow_unused=True
    )
    assert of_boxes[0] is None
    assert (of_boxes[1][background] == 0).all()
    assert of_boxes[1][~background].any(dim=1).all()
    (of_classes,) = torch.autograd.grad(losses["loss_cls"], leaves[1], allow_unused=True)
    assert of_classes is None


@pytest.mark.parametrize("reg_max", [4, 16])
def test_losses_are_float32_under_autocast(reg_max):
    torch.manual_seed(0)
    detector = make_detector(reg_max=reg_max)
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.3)
    pyramid = {f"p{3 + i}": torch.randn(2, 4, *shape) for i, shape in enumerate(SHAPES)}
    targets = make_targets(*CASES["some"], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(pyramid)
        inside = detector.losses(predictions, targets)
    outside = detector.losses(predictions, targets)
    assert {part.dtype for part in predictions[:2]} == {torch.float32}
    for name, loss in outside.items():
        assert inside[name].dtype == torch.float32
        assert torch.equal(inside[name], loss)


def test_the_losses_of_float32_are_those_of_float64():
    targets, predictions = make_targets(*CASES["many"]), make_predictions(1)
    exact = make_detector().losses(predictions, targets)
    single = Predictions(predictions.logits.float(), predictions.boxes.float(), None, SHAPES)
    for name, loss in make_detector().losses(single, targets).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact[name], rtol=1e-5, atol=0)
