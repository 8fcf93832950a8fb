import math

import pytest
import torch

from dyhead.detection import Predictions, Targets
from dyhead.detection.autoassign import AutoAssignOptions
from dyhead.detection.criteria import SoftAssignment
from tests.detection.objects import iou, make_boxes

CLASSES, STRIDES, SHAPES = 3, (8, 16, 32), [(6, 8), (3, 4), (1, 1)]
HEIGHT, WIDTH = 48, 64
NAMES = ["loss_positive", "loss_negative", "loss_center"]
# Of one object that no place lies in: a logarithm that ends at -100, weighed by 0.25.
CONSTANT = 25.0


def make_detector(shapes=SHAPES, classes=CLASSES, **options):
    """With center priors of its own for each class."""
    levels = tuple(f"p{3 + i}" for i in range(len(shapes)))
    built = AutoAssignOptions(num_classes=classes, in_features=levels, criterion=SoftAssignment(**options))
    detector = built.build(4, STRIDES[: len(shapes)]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter, scale in ((detector.criterion.mean, 0.6), (detector.criterion.deviation, 0.4)):
            parameter += scale * (torch.rand(parameter.shape, generator=generator) - 0.5)
    return detector


def make_predictions(images=1, shapes=SHAPES, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = sum(h * w for h, w in shapes)
    return Predictions(
        2 * torch.randn(images, places, CLASSES, generator=generator, dtype=dtype),
        2.5 * torch.rand(images, places, 4, generator=generator, dtype=dtype) - 0.2,
        2 * torch.randn(images, places, generator=generator, dtype=dtype),
        shapes,
    )


def make_targets(*counts, dtype=torch.float64):
    """Objects of which several of a class overlap."""
    boxes = [make_boxes(count, HEIGHT, WIDTH, seed=9 + i, smallest=10, dtype=dtype) for i, count in enumerate(counts)]
    return [Targets(box, torch.arange(len(box)) // 2 % CLASSES) for box in boxes]


def target(*boxes, dtype=torch.float64):
    """An image's objects, of the classes 0, 1, ..."""
    return Targets(torch.tensor(boxes, dtype=dtype).view(-1, 4), torch.arange(len(boxes)) % CLASSES)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def giou(a, b):
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    overlap = iou(a, b)
    union /= 1 + overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap - (hull - union) / hull


def by_loops(detector, predictions, targets, force=0):
    """The paper's formulas, image by image, object by object, place by place."""
    mean, deviation = detector.criterion.mean.tolist(), detector.criterion.deviation.tolist()
    places = []
    for stride, (h, w) in zip(STRIDES, predictions.shapes, strict=False):
        places += [(stride * j, stride * i, stride) for i in range(h) for j in range(w)]
    positive = negative = center = priors = 0.0
    for image, (boxes, labels, _) in enumerate(targets):
        boxes, labels = boxes.tolist(), labels.tolist()
        found, background = [], [[1.0] * CLASSES for _ in places]
        for (x, y, s), numbers in zip(places, predictions.boxes[image].tolist(), strict=True):
            left, top, right, bottom = (s * max(number, 0) for number in numbers)
            found.append([x - left, y - top, x + right, y + bottom])
        joint = [
            [sigmoid(logit) * sigmoid(quality) for logit in logits]
            for logits, quality in zip(
                predictions.logits[image].tolist(), predictions.quality[image].tolist(), strict=True
            )
        ]
        of_image = 0.0
        for box, label in zip(boxes, labels, strict=True):

            def prior(place, box=box, label=label):
                x, y, s = places[place]
                across = (x - (box[0] + box[2]) / 2) / s - mean[label][0]
                along = (y - (box[1] + box[3]) / 2) / s - mean[label][1]
                return math.exp(
                    -(across**2) / (2 * deviation[label][0] ** 2) - along**2 / (2 * deviation[label][1] ** 2)
                )

            inside = [i for i, (x, y, _) in enumerate(places) if box[0] < x < box[2] and box[1] < y < box[3]]
            if not inside and force:
                inside = sorted(range(len(places)), key=prior, reverse=True)[:force]
            if not inside:
                positive += 100
                continue
            likely = {i: joint[i][label] * math.exp(-5 * (1 - giou(found[i], box))) for i in inside}
            weights = {i: math.exp(3 * likely[i]) * prior(i) for i in inside}
            positive -= math.log(sum(weights[i] * likely[i] for i in inside) / sum(weights.values()))
            of_image += sum(map(prior, inside))
            good = {i: 1 / (1 - max(iou(found[i], other) for other in boxes)) for i in inside}
            low, high = min(good.values()), max(good.values())
            for i in inside:
                background[i][label] = 1 - (good[i] - low + 1e-12) / (high - low + 1e-12)
        center += len(boxes) / of_image if of_image else 0
        priors += of_image
        for row, weight in zip(joint, background, strict=True):
            negative -= sum((p * w) ** 2 * math.log(1 - p * w) for p, w in zip(row, weight, strict=True))
    objects = max(sum(len(each.boxes) for each in targets), 1)
    losses = (0.25 * positive / objects, 0.75 * negative / max(priors, 1), 0.75 * center / len(targets))
    return dict(zip(NAMES, losses, strict=True))


def losses_of(detector, predictions, targets):
    return {name: loss.item() for name, loss in detector.losses(predictions, targets).items()}


def test_a_case_by_hand():
    """A level of stride 8, 2 x 3 points, one class; an object (4, 4, 20, 12), of center (12, 8).

    Inside are the points a = (8, 8) and b = (16, 8), half a stride to the left and to the right of the center. With the
    mean (0.5, 0) and the deviation 1, G_a = exp(-1 / 2) = 0.60653 and G_b = 1; their sum is 1.60653.
    a: p = 0.75 * 0.5 = 0.375; its box (4, 4, 20, 8) is half of the object, GIoU = IoU = 0.5,
       q = 0.375 exp(-5 * 0.5) = 0.0307819, C = exp(3 q) = 1.09674.
    b: p = 0.5 * 0.5 = 0.25; its box (4, 4, 16, 8), GIoU = IoU = 48 / 128 = 0.375,
       q = 0.25 exp(-5 * 0.625) = 0.0109842, C = 1.03350.
    C G = 0.665210 and 1.03350, so that w = 0.391595 and 0.608405, and the object costs
       -log(0.391595 * 0.0307819 + 0.608405 * 0.0109842) = -log 0.0187369 = 3.97726, by 0.25 and one object 0.994315.
    1 / (1 - u) is 2 and 1.6, f is 1 and 0: a costs nothing as background, b -0.25^2 log 0.75 = 0.0179801,
       which divided by the priors and by 0.75 is 0.00839394. Elsewhere p is 0.
    The priors cost 0.75 * 1 / 1.60653 = 0.466845.
    """
    detector = make_detector([(2, 3)], classes=1)
    detector.criterion.mean.data = torch.tensor([[0.5, 0.0]], dtype=torch.float64)
    detector.criterion.deviation.data = torch.ones(1, 2, dtype=torch.float64)
    logits = torch.full((1, 6, 1), -50.0, dtype=torch.float64)
    logits[0, 4], logits[0, 5] = math.log(3), 0
    numbers = torch.ones(1, 6, 4, dtype=torch.float64)
    numbers[0, 4] = torch.tensor([0.5, 0.5, 1.5, 0.0])
    numbers[0, 5] = torch.tensor([1.5, 0.5, 0.0, -3.0])
    predictions = Predictions(logits, numbers, torch.zeros(1, 6, dtype=torch.float64), [(2, 3)])
    want = {"loss_positive": 0.994315, "loss_negative": 0.00839394, "loss_center": 0.466845}
    assert losses_of(detector, predictions, [target((4, 4, 20, 12))]) == pytest.approx(want, rel=2e-6)


@pytest.mark.parametrize("counts", [(7,), (4, 9), (3, 0), (0, 2, 1), (0,), (0, 0)])
@pytest.mark.parametrize("seed", range(2))
def test_equals_the_formulas_by_loops(counts, seed):
    detector, predictions, targets = make_detector(), make_predictions(len(counts), seed=seed), make_targets(*counts)
    want = by_loops(detector, predictions, targets)
    assert losses_of(detector, predictions, targets) == pytest.approx(want, rel=1e-6)
    assert (want["loss_positive"] > 0) == (sum(counts) > 0)


@pytest.mark.parametrize("shapes", [[(1, 1)], [(5, 1)], [(2, 2), (1, 1), (1, 1)]])
def test_small_levels_by_loops(shapes):
    detector, predictions, targets = make_detector(shapes), make_predictions(shapes=shapes), make_targets(3)
    assert losses_of(detector, predictions, targets) == pytest.approx(
        by_loops(detector, predictions, targets), rel=1e-6
    )


@pytest.mark.parametrize("force", [0, 9, 1000])
def test_objects_smaller_than_a_cell_by_loops(force):
    detector, predictions = make_detector(force_topk=force), make_predictions()
    targets = [target((9, 9, 15, 15), (5, 6, 40, 30), (33.5, 17, 39, 23))]
    want = by_loops(detector, predictions, targets, force=min(force, 61))
    assert losses_of(detector, predictions, targets) == pytest.approx(want, rel=1e-6)


def test_an_object_without_a_place_costs_a_constant_and_teaches_nothing():
    predictions, targets = make_predictions(), [target((9, 9, 15, 15))]
    predictions.boxes.requires_grad_()
    detector = make_detector()
    losses = detector.losses(predictions, targets)
    assert (losses["loss_positive"].item(), losses["loss_center"].item()) == (CONSTANT, 0)
    sum(losses.values()).backward()
    for gradient in (predictions.boxes.grad, detector.criterion.mean.grad, detector.criterion.deviation.grad):
        assert gradient is not None
        assert not gradient.any()

    forced = make_detector(force_topk=9)
    losses = forced.losses(predictions, targets)
    assert losses["loss_positive"] < CONSTANT
    sum(losses.values()).backward()
    assert (predictions.boxes.grad.any(dim=2).sum(), forced.criterion.mean.grad.any()) == (9, True)


def test_a_place_at_the_border_of_an_object_is_not_inside():
    detector, predictions = make_detector(), make_predictions()
    places = detector.places(predictions)
    (image,) = [target((8, 8, 24, 24), (0, 0, 9, 9))]
    place, owner, _, _ = detector.criterion.candidates(detector, predictions, 0, places, image)
    points = [(*places.centers[i].tolist(), n) for i, n in zip(place.tolist(), owner.tolist(), strict=True)]
    # Of strides 8 and 16; the coarsest level's point is the image's corner.
    assert points == [(8, 8, 1), (16, 16, 0), (16, 16, 0)]


def test_gradients_by_finite_differences():
    targets = make_targets(4, 0, 2)
    logits, numbers, quality, shapes = make_predictions(3)[:4]
    detector = make_detector()
    given = [x.requires_grad_() for x in (logits, numbers, quality)]

    def losses(names, logits, numbers, quality):
        found = detector.losses(Predictions(logits, numbers, quality, shapes), targets)
        return tuple(found[name] for name in names)

    torch.autograd.gradcheck(lambda *x: losses(("loss_positive",), *x), given, fast_mode=True, atol=1e-6)
    # The background's weights pass no gradient on to boxes, which finite differences would see.
    torch.autograd.gradcheck(
        lambda logits, quality: losses(("loss_negative",), logits, numbers.detach(), quality),
        [logits, quality],
        fast_mode=True,
        atol=1e-6,
    )
    for name in ("mean", "deviation"):
        parameter = getattr(detector.criterion, name)
        for entry in range(parameter.numel()):
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[entry] += step
                    sides.append(torch.stack(losses(("loss_positive", "loss_center"), *given)).sum().item())
                    parameter.view(-1)[entry] -= step
            total = sum(losses(("loss_positive", "loss_center"), *given))
            (gradient,) = torch.autograd.grad(total, parameter)
            assert gradient.view(-1)[entry].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_the_background_teaches_neither_boxes_nor_priors():
    detector, predictions = make_detector(), make_predictions()
    predictions.boxes.requires_grad_()
    predictions.quality.requires_grad_()
    loss = detector.losses(predictions, make_targets(4))["loss_negative"]
    wanted = [predictions.quality, predictions.boxes, detector.criterion.mean, detector.criterion.deviation]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert gradients[0].any()
    assert gradients[1:] == (None, None, None)


def test_weights_of_the_losses():
    predictions, targets = make_predictions(), make_targets(4)
    usual = losses_of(make_detector(), predictions, targets)
    options = {"positive_loss_weight": 0.5, "negative_loss_weight": 3.0, "center_loss_weight": 0.0}
    other = losses_of(make_detector(**options), predictions, targets)
    ratios = dict(zip(NAMES, (2, 4, 0), strict=True))
    assert other == pytest.approx({name: ratio * usual[name] for name, ratio in ratios.items()})


@pytest.mark.parametrize("boxes", [0.0, 1.0])
def test_a_perfect_box_and_predictions_as_large_as_they_get_are_finite(boxes):
    """In float32: an IoU of 1, probabilities of 0 and 1, and boxes without an area."""
    detector = make_detector([(2, 3)]).float()
    numbers = torch.full((1, 6, 4), boxes)  # 1.0: at the point (8, 8) the object itself
    for logit in (-200.0, 200.0):
        logits = torch.full((1, 6, CLASSES), logit, requires_grad=True)
        predictions = Predictions(logits, numbers.clone().requires_grad_(), torch.full((1, 6), logit), [(2, 3)])
        losses = detector.losses(predictions, [target((0, 0, 16, 16), dtype=torch.float32)])
        sum(losses.values()).backward()
        gradients = [logits.grad, predictions.boxes.grad, detector.criterion.mean.grad]
        assert all(value.isfinite().all() for value in (*losses.values(), *gradients))


def test_what_is_nan_is_nan_in_the_loss():
    detector, predictions = make_detector(), make_predictions()
    predictions.logits[0, 10] = math.nan
    losses = losses_of(detector, predictions, make_targets(4))
    assert math.isnan(losses["loss_negative"])


def test_where_training_starts():
    """Probability 0.02, boxes of four strides to each side, priors of mean 0 and deviation 1."""
    options = AutoAssignOptions(num_classes=CLASSES, in_features=("p3", "p4", "p5"))
    detector = options.build(4, STRIDES)
    predictions = detector({f"p{3 + i}": torch.zeros(1, 4, *shape) for i, shape in enumerate(SHAPES)})
    torch.testing.assert_close(predictions.logits.sigmoid(), torch.full((1, 61, CLASSES), 0.02))
    places = detector.places(predictions)
    first = [sum(places.counts[:i]) for i in range(3)]
    assert places.centers[first].tolist() == [[0, 0]] * 3
    boxes = detector.box_form.decode(predictions.boxes[0], places.anchors)
    assert boxes[first].tolist() == [[-4.0 * s, -4.0 * s, 4.0 * s, 4.0 * s] for s in STRIDES]
    assert not detector.criterion.mean.any()
    assert (detector.criterion.deviation == 1).all()
    assert {"criterion.mean", "criterion.deviation"} <= set(detector.state_dict())
