"""Heatmaps and losses of SaccadeNet against loops over cells, and against numbers written down by hand."""

import math

import pytest
import torch

from dyhead.detection import Predictions, Targets
from dyhead.detection.criteria import CenterCriterion
from dyhead.detection.saccadenet import SaccadeNetOptions
from tests.detection.objects import make_boxes

CLASSES, STRIDE, HEIGHT, WIDTH = 3, 4, 12, 16


def make_detector(criterion=None, classes=CLASSES, **options):
    criterion = CenterCriterion() if criterion is None else criterion
    options = SaccadeNetOptions(num_classes=classes, head_channels=4, criterion=criterion, **options)
    return options.build(4, [STRIDE]).double()


def make_predictions(images, numbers=10, shape=(HEIGHT, WIDTH), classes=CLASSES):
    torch.manual_seed(0)
    places = shape[0] * shape[1]
    return Predictions(
        torch.randn(images, places, classes, dtype=torch.float64),
        2 * torch.randn(images, places, numbers, dtype=torch.float64),
        None,
        [shape],
    )


def make_targets(*counts):
    boxes = [
        make_boxes(count, HEIGHT * STRIDE, WIDTH * STRIDE, seed=3 + i, smallest=2) for i, count in enumerate(counts)
    ]
    return [Targets(box, torch.arange(len(box)) % CLASSES) for box in boxes]


def objects(*boxes, labels=None):
    labels = [0] * len(boxes) if labels is None else labels
    return Targets(torch.tensor(boxes, dtype=torch.float64).view(-1, 4), torch.tensor(labels, dtype=torch.int64))


def radius_by_cases(width, height, overlap):
    """The least of CenterNet's three radii, each with its factor."""
    width, height = math.ceil(width), math.ceil(height)
    found = []
    for a, b, c in (
        (1, height + width, width * height * (1 - overlap) / (1 + overlap)),
        (4, 2 * (height + width), (1 - overlap) * width * height),
        (4 * overlap, -2 * overlap * (height + width), (overlap - 1) * width * height),
    ):
        found.append((b + math.sqrt(b * b - 4 * a * c)) / 2)
    return max(int(min(found)), 0)


def draw(heat, x, y, radius):
    sigma = (2 * radius + 1) / 6
    for i in range(len(heat)):
        for j in range(len(heat[0])):
            if abs(i - y) <= radius and abs(j - x) <= radius:
                heat[i][j] = max(heat[i][j], math.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * sigma**2)))


def truth_by_loops(criterion, target, shape, classes=CLASSES):
    """Heatmaps as lists of rows of lists, and cells, centers and sizes in cells of the objects."""
    height, width = shape
    heat = [[[0.0] * width for _ in range(height)] for _ in range(classes)]
    corners = [[[0.0] * width for _ in range(height)] for _ in range(4)]
    found = []
    for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
        x0, y0, x1, y1 = (side / STRIDE for side in box)
        if criterion.clip_targets:
            x0, x1 = (min(max(x, 0), width - 1) for x in (x0, x1))
            y0, y1 = (min(max(y, 0), height - 1) for y in (y0, y1))
            if x1 <= x0 or y1 <= y0:
                continue
        radius = radius_by_cases(x1 - x0, y1 - y0, criterion.heatmap_overlap)
        center = ((x0 + x1) / 2, (y0 + y1) / 2)
        cell = (min(int(center[0]), width - 1), min(int(center[1]), height - 1))
        draw(heat[label], *cell, radius)
        for k, (x, y) in enumerate(((x0, y0), (x1, y0), (x0, y1), (x1, y1))):
            at = corners[0 if criterion.corners_in_one_map else k]
            draw(at, min(int(x), width - 1), min(int(y), height - 1), radius)
        found.append((cell, center, (x1 - x0, y1 - y0)))
    return heat, corners, found


def focal(logit, y):
    p = 1 / (1 + math.exp(-logit))
    return -((1 - p) ** 2) * math.log(p) if y == 1 else -((1 - y) ** 4) * p**2 * math.log(1 - p)


def losses_by_loops(criterion, refined, predictions, targets):
    ((height, width),) = predictions.shapes
    of_classes = of_corners = 0.0
    ones, corner_ones, errors, count = 0, 0, [0.0] * 4, 0
    for image, target in enumerate(targets):
        heat, corners, found = truth_by_loops(criterion, target, (height, width))
        for i in range(height):
            for j in range(width):
                place = i * width + j
                for k, logit in enumerate(predictions.logits[image, place].tolist()):
                    of_classes += focal(logit, heat[k][i][j])
                    ones += heat[k][i][j] == 1
                for k, logit in enumerate(predictions.boxes[image, place, -4:].tolist()):
                    of_corners += focal(logit, corners[k][i][j])
                    corner_ones += corners[k][i][j] == 1
        for (x, y), center, size in found:
            count += 1
            numbers = predictions.boxes[image, y * width + x].tolist()
            offset = (center[0] - x, center[1] - y)
            for part, want in enumerate((offset, size, size, offset)[: 4 if refined else 3]):
                errors[part] += sum(abs(a - b) for a, b in zip(numbers[2 * part : 2 * part + 2], want, strict=True)) / 2
    losses = {
        "loss_heatmap": of_classes / max(ones, 1),
        "loss_corner": criterion.corner_loss_weight * of_corners / max(corner_ones, 1) / 4,
        "loss_center": criterion.center_loss_weight * errors[0] / max(count, 1),
        "loss_size": criterion.size_loss_weight * errors[1] / max(count, 1),
        "loss_refined_size": criterion.refined_size_loss_weight * errors[2] / max(count, 1),
    }
    if refined:
        losses["loss_refined_center"] = criterion.refined_center_loss_weight * errors[3] / max(count, 1)
    return losses


CRITERIA = {
    "default": CenterCriterion(),
    "as published": CenterCriterion(corners_in_one_map=True, clip_targets=True),
    "other numbers": CenterCriterion(0.5, 0.3, 0.2, 0.7, 2.0, heatmap_overlap=0.4),
}


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("counts", [(5, 0, 9), (0,)])
@pytest.mark.parametrize("kind", CRITERIA)
def test_losses_by_loops(kind, counts, refined):
    criterion, targets = CRITERIA[kind], make_targets(*counts)
    detector = make_detector(criterion, refine_center=refined)
    predictions = make_predictions(len(counts), 12 if refined else 10)
    got = {key: loss.item() for key, loss in detector.losses(predictions, targets).items()}
    assert got == pytest.approx(
        losses_by_loops(criterion, refined, predictions, targets), rel=1e-5
    )  # Gaussians: float32


@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize(
    "target",
    [
        objects((3, 5, 40, 44), (20, 1, 62, 47), (21, 9, 22, 10), labels=[2, 0, 2]),
        objects((0, 0, 64, 48), (60, 44, 64, 48), (0, 40, 64, 48), (63.5, 0, 64, 48)),  # to the border
        objects((5.1, 5.2, 6.3, 6.4), (5, 5, 7, 7)),  # smaller than a cell, and in one cell
        objects(),
    ],
    ids=["objects", "border", "small", "none"],
)
def test_heatmaps_by_loops(kind, target):
    criterion, predictions = CRITERIA[kind], make_predictions(1)
    truth = criterion.truth(make_detector(criterion), predictions, target)
    heat, corners, found = truth_by_loops(criterion, target, (HEIGHT, WIDTH))
    for got, want in ((truth.classes, heat), (truth.corners, corners)):
        torch.testing.assert_close(got.T.unflatten(1, (HEIGHT, WIDTH)), torch.tensor(want).double())
    assert truth.places.tolist() == [y * WIDTH + x for (x, y), _, _ in found]
    for box, (_, (x, y), (w, h)) in zip(truth.boxes.tolist(), found, strict=True):
        want = [STRIDE * side for side in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        assert box == pytest.approx(want)


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.4, 0.7, 0.95])
def test_the_radius_is_the_least_of_centernets_three(overlap):
    sizes = [(w, h) for w in (0.2, 1, 1.5, 4, 9.3, 31, 200) for h in (0.7, 2, 5, 17.9, 100, 336)]
    got = CenterCriterion(heatmap_overlap=overlap).radius(torch.tensor(sizes, dtype=torch.float64))
    assert got.tolist() == [radius_by_cases(w, h, overlap) for w, h in sizes]
    assert got.max() > 5


def test_by_hand():
    """An object of 4 x 4 cells on a level of 6 x 6, all logits 0.

    Its radius is sqrt(0.49 * 64 + 0.84 * 16) - 0.7 * 8 = 6.693 - 5.6 = 1.09: 1 cell, sigma is 1/2. The cells beside
    the center have exp(-2) = 0.1353 and weigh (1 - 0.1353)^4 = 0.5590; those at its corners exp(-4) = 0.0183: 0.9288.
    A logit of 0 costs c = ln(2) / 4 = 0.17329 times its weight.

    Classes: the center (2, 2) has 4 + 4 of them, 27 weigh 1: 1 + 4 * 0.5590 + 4 * 0.9288 + 27 = 33.951 c.
    Corners: (0, 0), (4, 0), (0, 4), (4, 4) have 2 + 1, 3 + 2, 3 + 2, 4 + 4 of them, and 32, 30, 30, 27 weigh 1:
    4 + 12 * 0.5590 + 9 * 0.9288 + 119 = 138.067 c, divided by 4 cells, and by 4, times 4.
    """
    predictions = Predictions(
        torch.zeros(1, 36, 1, dtype=torch.float64), torch.zeros(1, 36, 10, dtype=torch.float64), None, [(6, 6)]
    )
    predictions.boxes[0, 2 * 6 + 2, :6] = torch.tensor([0.4, 0.2, 3, 5, 4, 4.5])
    got = make_detector(classes=1).losses(predictions, [objects((2, 2, 18, 18))])
    want = {
        "loss_heatmap": 33.951 * 0.173287,
        "loss_corner": 138.067 * 0.173287 / 4,
        "loss_center": (0.1 + 0.3) / 2,  # the center is at (2.5, 2.5)
        "loss_size": 0.1 * (1 + 1) / 2,
        "loss_refined_size": 0.1 * (0 + 0.5) / 2,
    }
    assert {key: loss.item() for key, loss in got.items()} == pytest.approx(want, rel=1e-4)


def test_a_level_of_one_cell():
    detector, predictions = make_detector(), make_predictions(1, shape=(1, 1))
    target = objects((1, 0, 4, 3), labels=[1])
    truth = detector.criterion.truth(detector, predictions, target)
    assert truth.classes.tolist() == [[0, 1, 0]]
    assert truth.corners.tolist() == [[1, 1, 1, 1]]
    got = {key: loss.item() for key, loss in detector.losses(predictions, [target]).items()}
    assert got == pytest.approx(losses_by_loops(detector.criterion, False, predictions, [target]))


def test_objects_whose_center_is_in_one_cell_share_what_it_predicts():
    """Two boxes cost what each does alone, on average, and their class counts once."""
    detector, predictions = make_detector(), make_predictions(1)
    first, second = objects((8, 8, 40, 30)), objects((10, 8, 38, 30))
    both = Targets(torch.cat([first.boxes, second.boxes]), torch.cat([first.labels, second.labels]))
    alone = [detector.losses(predictions, [target]) for target in (first, second)]
    together = detector.losses(predictions, [both])
    for key in ("loss_center", "loss_size", "loss_refined_size"):
        torch.testing.assert_close(together[key], (alone[0][key] + alone[1][key]) / 2)
    assert (detector.criterion.truth(detector, predictions, both).classes == 1).sum() == 1


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_gradients_are_those_of_finite_differences(counts):
    detector = make_detector(refine_center=True)
    predictions, targets = make_predictions(2, 12, (3, 4)), make_targets(*counts)
    targets = [Targets(target.boxes / 4, target.labels) for target in targets]

    def total(logits, numbers):
        losses = detector.losses(predictions._replace(logits=logits, boxes=numbers), targets)
        return torch.stack(list(losses.values()))

    inputs = (predictions.logits.requires_grad_(), predictions.boxes.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


def test_losses_in_evaluation_mode_are_refused():
    detector = make_detector().eval()
    predictions = detector({"p2": torch.zeros(1, 4, HEIGHT, WIDTH, dtype=torch.float64)})
    with pytest.raises(ValueError, match="losses: expected the predictions of a detector in training mode, got some w"):
        detector.losses(predictions, [objects((3, 5, 40, 44))])
