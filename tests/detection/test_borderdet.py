import math

import pytest
import torch
from torch import nn

from dyhead.checkpoints import Conversion, load_into
from dyhead.detection import Predictions, Targets
from dyhead.detection.assigners import BACKGROUND
from dyhead.detection.borderdet import BorderDetOptions
from dyhead.detection.criteria import BorderWeights
from dyhead.detection.detector import BoxLoss
from dyhead.detection.normalizer import KINDS as NORMALIZERS
from tests.detection.objects import iou, make_boxes

CLASSES, LEVELS, STRIDES, SHAPES = 3, ("p3", "p4", "p5"), (8, 16, 32), [(6, 8), (3, 4), (1, 1)]
HEIGHT, WIDTH = 48, 64
PLACES = [
    (stride, level, j * stride, i * stride)
    for level, (stride, (h, w)) in enumerate(zip(STRIDES, SHAPES, strict=True))
    for i in range(h)
    for j in range(w)
]
SMALL = {"border_class_channels": 4, "border_box_channels": 4}


def build(**options):
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "in_features": LEVELS, **SMALL, **options}
    return BorderDetOptions(**options).build(8, STRIDES).double()


def make_predictions(targets, seed=0):
    """Coarse boxes of which every third is nearly that of some object, so that there is something to refine."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(len(targets), len(PLACES), *size, generator=generator, dtype=torch.float64)

    numbers = random(8)
    for image, (boxes, *_) in enumerate(targets):
        for place, (stride, _, x, y) in enumerate(PLACES):
            if len(boxes) and place % 3 == 0:
                x0, y0, x1, y1 = boxes[place % len(boxes)].tolist()
                sides = torch.tensor([x - x0, y - y0, x1 - x, y1 - y], dtype=torch.float64) / stride
                numbers[image, place, :4] = sides + 0.1 * numbers[image, place, :4]
    return Predictions(random(CLASSES), numbers, random(), SHAPES, random(CLASSES))


def make_targets(*counts):
    boxes = [make_boxes(count, HEIGHT, WIDTH, seed=3 + i, smallest=12) for i, count in enumerate(counts)]
    return [Targets(box, torch.arange(len(box)) % CLASSES) for box in boxes]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def focal(logits, label):
    cost = 0.0
    for k, logit in enumerate(logits):
        p = sigmoid(logit)
        cost -= 0.25 * (1 - p) ** 2 * math.log(p) if k == label else 0.75 * p**2 * math.log(1 - p)
    return cost


def giou_loss(a, b):
    width, height = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    overlap = iou(a, b)
    union = sum(areas) / (1 + overlap)
    return 1 - overlap + (width * height - union) / (width * height)


def first_owner(place, boxes):
    """FCOS: strictly inside, within 1.5 strides of the center, on the level for the size, of the smallest object."""
    stride, level, x, y = place
    best, owner = math.inf, BACKGROUND
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        sides = (x - x0, y - y0, x1 - x, y1 - y)
        near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
        low, high = 0 if level == 0 else 4 * stride, math.inf if level == len(STRIDES) - 1 else 8 * stride
        area = (x1 - x0) * (y1 - y0)
        if min(sides) > 0 and near and low <= max(sides) <= high and area < best:
            best, owner = area, index
    return owner


def losses_by_loops(predictions, targets, normalizer, weights, by_centerness):
    """Every rule of the paper and of its code, place by place; and the two assignments."""
    costs = {"cls": 0.0, "box": 0.0, "center": 0.0, "border cls": 0.0, "border box": 0.0}
    total, counts, assignments = 0.0, ([], []), []
    for image, (boxes, labels, _) in enumerate(targets):
        boxes, labels, owners = boxes.tolist(), labels.tolist(), ([], [])
        for place, at in enumerate(PLACES):
            stride, _, x, y = at
            numbers = predictions.boxes[image, place].tolist()
            left, top, right, bottom = (max(v, 0) * stride for v in numbers[:4])
            coarse = [x - left, y - top, x + right, y + bottom]

            owner = first_owner(at, boxes)
            owners[0].append(owner)
            costs["cls"] += focal(predictions.logits[image, place].tolist(), labels[owner] if owner >= 0 else None)
            if owner >= 0:
                x0, y0, x1, y1 = boxes[owner]
                across, along = sorted((x - x0, x1 - x)), sorted((y - y0, y1 - y))
                good = math.sqrt(across[0] / across[1] * along[0] / along[1])
                q = sigmoid(predictions.quality[image, place].item())
                costs["center"] -= good * math.log(q) + (1 - good) * math.log(1 - q)
                costs["box"] += (good if by_centerness else 1) * giou_loss(coarse, boxes[owner])
                total += good

            overlaps = [iou(coarse, box) for box in boxes]
            owner = overlaps.index(max(overlaps)) if max(overlaps, default=0) >= 0.6 else BACKGROUND
            owners[1].append(owner)
            logits = predictions.refined_logits[image, place].tolist()
            costs["border cls"] += focal(logits, labels[owner] if owner >= 0 else None)
            if owner >= 0:
                size = [coarse[2] - coarse[0], coarse[3] - coarse[1]] * 2
                for shift, truth, side, unit in zip(numbers[4:], boxes[owner], coarse, size, strict=True):
                    costs["border box"] += abs(shift - (truth - side) / (0.5 * unit))
        assignments.append(owners)
        for own, count in zip(owners, counts, strict=True):
            count.append(sum(owner >= 0 for owner in own))
    divisors = [
        {
            "positives": max(sum(count), 1),
            "positives_per_image": sum(max(each, 1) for each in count),
            "moving_average": 0.9 * 300 + 0.1 * max(sum(count), 1),
        }[normalizer]
        for count in counts
    ]
    losses = {
        "loss_cls": costs["cls"] / divisors[0],
        "loss_box_reg": costs["box"] / (max(total, 1.0) if by_centerness else divisors[0]),
        "loss_centerness": costs["center"] / divisors[0],
        "loss_border_cls": weights[0] * costs["border cls"] / divisors[1],
        "loss_border_reg": weights[1] * costs["border box"] / divisors[1],
    }
    return losses, assignments, counts


@pytest.mark.parametrize("counts", [(6, 2), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize(
    ("normalizer", "weights", "by_centerness"),
    [*((kind, (1.0, 1.0), True) for kind in NORMALIZERS), ("positives", (0.5, 2.0), False)],
)
def test_assignments_and_losses_by_loops(normalizer, weights, by_centerness, counts):
    detector = build(
        loss_normalizer=normalizer,
        border_weights=BorderWeights(*weights),
        box_loss=BoxLoss(1.0, by_centerness, 1.0),
    )
    targets = make_targets(*counts)
    predictions = make_predictions(targets)
    want, assignments, positives = losses_by_loops(predictions, targets, normalizer, weights, by_centerness)
    first = detector.assign(detector.places(predictions), targets)
    border = detector.criterion.assign(detector, predictions, targets)
    assert [(a.tolist(), b.tolist()) for a, b in zip(first, border, strict=True)] == assignments
    losses = {key: value.item() for key, value in detector.losses(predictions, targets).items()}
    assert losses == pytest.approx(want, rel=1e-6)
    assert sum(counts) == 0 or (all(value > 0 for value in want.values()) and sum(positives[1]) >= 5)


def one_level(numbers, logits=0.0, quality=0.0, refined=0.0):
    """Four places of stride 8, at (0, 0), (8, 0), (0, 8) and (8, 8); the same logits at all."""

    def same(value, *size):
        return torch.full((1, 4, *size), value, dtype=torch.float64)

    boxes = torch.zeros(1, 4, 8, dtype=torch.float64)
    for place, values in numbers.items():
        boxes[0, place] = torch.tensor(values, dtype=torch.float64)
    return Predictions(same(logits, CLASSES), boxes, same(quality), [(2, 2)], same(refined, CLASSES))


def test_losses_by_hand():
    """One object, 4, 4, 20, 20, of class 1. Inside it lies one of four places, (8, 8), the only positive one at first.

    Its sides are 4, 4, 12, 12 away, its centerness is root(4/12 * 4/12) = 1/3. Distances of 0.5, 0.5, 1.25, 1.25
    strides are the coarse box 4, 4, 18, 18, whose IoU, and GIoU, is 14^2 / 16^2 = 0.765625. So the box costs 0.234375
    times 1/3, divided by 1, for the sum of the centernesses is below that: 0.078125. Logits are 0: the centerness costs
    log 2, the positive class 0.25 * 0.25 log 2, the eleven others 0.75 * 0.25 log 2 each: 2.125 log 2.

    The coarse box of (8, 0) is 4, 0, 18, 18. Its IoU is 14^2 / (14 * 18 + 16^2 - 14^2) = 196 / 312, over 0.6: two
    border positives. Their classes cost (2 * 0.0625 + 10 * 0.1875) log 2 / 2 = log 2. The shifts of (8, 8) are in units
    of 7 pixels and should be 0, 0, 2/7, 2/7; they are 0, 0, 0, 1 and cost 2/7 + 5/7 = 1. Those of (8, 0) are in units
    of 7 and 9 and should be 0, 4/9, 2/7, 2/9; they are 0 and cost 20/21. Together 41/21, by 2.
    """
    detector = BorderDetOptions(num_classes=CLASSES, in_features=("p3",), **SMALL).build(8, (8,)).double()
    numbers = {1: [0.5, 0, 1.25, 2.25, 0, 0, 0, 0], 3: [0.5, 0.5, 1.25, 1.25, 0, 0, 0, 1]}
    targets = [Targets(torch.tensor([[4.0, 4.0, 20.0, 20.0]], dtype=torch.float64), torch.tensor([1]))]
    losses = {key: value.item() for key, value in detector.losses(one_level(numbers), targets).items()}
    assert losses == pytest.approx(
        {
            "loss_cls": 2.125 * math.log(2),
            "loss_box_reg": 0.078125,
            "loss_centerness": math.log(2),
            "loss_border_cls": math.log(2),
            "loss_border_reg": 41 / 42,
        },
        rel=1e-6,
    )


def test_detections_by_hand():
    """The coarse box 4, 4, 18, 18 of (8, 8), of which a shift of 1 is 7 pixels, becomes 4, 4, 18, 25.

    What is compared with the threshold is root(class * centerness); the score is the root of that times the border's
    probability of the class. Elsewhere the class is below the threshold, however sure the border is.
    """
    options = BorderDetOptions(num_classes=CLASSES, in_features=("p3",), score_thresh_test=0.5, **SMALL)
    detector = options.build(8, (8,)).double()
    predictions = one_level({3: [0.5, 0.5, 1.25, 1.25, 0, 0, 0, 1]}, logits=-9.0, quality=1.0, refined=9.0)
    predictions.logits[0, 3, 2] = 2.0
    predictions.refined_logits[0, 3, 2] = -3.0
    (found,) = detector.detections(predictions, [(32, 32)])
    assert found.labels.tolist() == [2]
    assert found.boxes.tolist() == [[4, 4, 18, 25]]
    first = math.sqrt(sigmoid(2) * sigmoid(1))
    assert first > 0.5 > math.sqrt(first * sigmoid(-3))
    assert found.scores.tolist() == pytest.approx([math.sqrt(first * sigmoid(-3))])


def test_what_the_border_does_not_know_is_not_detected():
    detector = build(score_thresh_test=0.1)
    predictions, without = (make_predictions(make_targets(0)) for _ in range(2))
    predictions.refined_logits[0, ::2] = math.nan
    without.logits[0, ::2] = -99.0
    (got,), (want,) = (detector.detections(each, [(HEIGHT, WIDTH)]) for each in (predictions, without))
    assert all(torch.equal(part, other) for part, other in zip(got[:3], want[:3], strict=True))
    assert len(got.boxes) > 5


def test_gradients_are_those_of_finite_differences():
    """Of all losses, but that a coarse box's numbers get none from the border, to which the box is given."""
    detector, targets = build(), make_targets(4, 0)
    leaves = make_predictions(targets)
    values = [leaves.logits, leaves.boxes, leaves.quality, leaves.refined_logits]
    for value in values:
        value.requires_grad_()
    first = ("loss_cls", "loss_box_reg", "loss_centerness")
    sum(detector.losses(leaves, targets).values()).backward()

    def check(value, part, names):
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            direction = torch.zeros_like(value)
            direction[part] = torch.randn(value[part].shape, generator=generator, dtype=torch.float64)
            ends = []
            with torch.no_grad():
                for sign in (-1, 1):
                    moved = [v + sign * 1e-7 * direction if v is value else v for v in values]
                    losses = detector.losses(Predictions(*moved[:3], SHAPES, moved[3]), targets)
                    ends.append(sum(losses[name] for name in names))
            slope = (ends[1] - ends[0]) / 2e-7
            torch.testing.assert_close((value.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)
            assert slope.abs() > 1e-3

    for value in (leaves.logits, leaves.quality, leaves.refined_logits):
        check(value, ..., detector.loss_names)
    check(leaves.boxes, (..., slice(4, None)), detector.loss_names)
    check(leaves.boxes, (..., slice(4)), first)


def test_an_object_smaller_than_a_cell_and_one_at_the_border():
    """Where a place lies in none of them, they can only be found by coarse boxes that happen to fit."""
    detector = build()
    boxes = torch.tensor([[30.2, 30.3, 31.1, 31.9], [0, 0, 5, 48], [60, 44, 64, 48]], dtype=torch.float64)
    targets = [Targets(boxes, torch.tensor([0, 1, 2]))]
    predictions = make_predictions(targets)
    first = detector.assign(detector.places(predictions), targets)
    border = detector.criterion.assign(detector, predictions, targets)
    want, (assignments,), _ = losses_by_loops(predictions, targets, "positives", (1, 1), True)
    assert (first[0].tolist(), border[0].tolist()) == assignments
    assert set(first[0].tolist()) == {BACKGROUND}
    losses = {key: value.item() for key, value in detector.losses(predictions, targets).items()}
    assert losses == pytest.approx(want, rel=1e-6)


def test_trains_on_one_image_until_it_finds_the_object():
    torch.manual_seed(0)
    options = BorderDetOptions(num_classes=CLASSES, in_features=LEVELS, num_convs=1, **SMALL)
    detector = options.build(8, STRIDES)
    pyramid = {
        name: torch.randn(1, 8, *shape, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate(zip(LEVELS, SHAPES, strict=True))
    }
    targets = [Targets(torch.tensor([[10.0, 6.0, 44.0, 38.0]]), torch.tensor([1]))]
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        losses = detector.losses(detector(pyramid), targets)
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["loss_border_reg"] > 0  # coarse boxes became good enough to be refined
    (found,) = detector.eval().detections(detector(pyramid), [(HEIGHT, WIDTH)])
    assert found.labels[0] == 1
    assert iou(found.boxes[0].tolist(), targets[0].boxes[0].tolist()) > 0.8


@pytest.mark.parametrize(("written", "read"), [("positives", "moving_average"), ("moving_average", "positives")])
def test_checkpoints_load_with_another_normalizer(written, read, caplog):
    first, second = build(loss_normalizer=written), build(loss_normalizer=read)
    nn.init.normal_(first.head.border_logits.weight)
    state = {f"detector.{key}": value for key, value in first.state_dict().items()}
    model = nn.Module()
    model.detector = second
    load_into(model, Conversion(state, "ours"), strict=True, origin="w.pth")
    assert torch.equal(second.head.border_logits.weight, first.head.border_logits.weight)
    assert second.criterion.border_normalizer.average == (300 if read == "moving_average" else None)
    assert "Not loaded" not in caplog.text
