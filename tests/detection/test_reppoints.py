import math

import pytest
import torch
from torch import nn

from dyhead.checkpoints import Conversion, convert, load_into
from dyhead.detection import Predictions, Targets
from dyhead.detection.assigners import BACKGROUND, IGNORED
from dyhead.detection.boxes.points import KINDS
from dyhead.detection.normalizer import KINDS as NORMALIZERS
from dyhead.detection.reppoints import RepPointsOptions
from dyhead.options import leaves
from tests.detection.objects import iou, make_boxes

CLASSES, LEVELS, STRIDES, SHAPES = 3, ("p3", "p4", "p5"), (8, 16, 32), [(6, 8), (3, 4), (1, 1)]
HEIGHT, WIDTH = 48, 64
PLACES = sum(h * w for h, w in SHAPES)


def build(**options):
    torch.manual_seed(0)
    return RepPointsOptions(num_classes=CLASSES, in_features=LEVELS, **options).build(8, STRIDES).double()


def make_predictions(images, seed=0):
    """Points around each place, over about three cells, so that first boxes overlap the objects."""
    generator = torch.Generator().manual_seed(seed)
    numbers = 1.5 * torch.randn(images, PLACES, 36, generator=generator, dtype=torch.float64)
    logits = torch.randn(images, PLACES, CLASSES, generator=generator, dtype=torch.float64)
    return Predictions(logits, numbers, None, SHAPES)


def make_targets(*counts):
    boxes = [make_boxes(count, HEIGHT, WIDTH, seed=7 + i, smallest=3) for i, count in enumerate(counts)]
    return [Targets(box, torch.arange(len(box)) % CLASSES) for box in boxes]


def smooth_l1(x, beta):
    return x * x / (2 * beta) if x < beta else x - beta / 2


def box_of(kind, points, x, y, stride, log_scale):
    sides = []
    for values, origin, factor in ((points[1::2], x, log_scale[0]), (points[0::2], y, log_scale[1])):
        values = values[:4] if kind == "partial_minmax" else values
        low, high = min(values), max(values)
        if kind == "moment":
            mean = sum(values) / len(values)
            half = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) * math.exp(factor)
            low, high = mean - half, mean + half
        sides.append((origin + low * stride, origin + high * stride))
    return [sides[0][0], sides[1][0], sides[0][1], sides[1][1]]


def losses_by_loops(options, log_scale, predictions, targets):
    """Every rule of the paper and of mmdetection, place by place; and the two assignments."""
    places = [
        (level, stride, j * stride, i * stride)
        for level, (stride, (h, w)) in enumerate(zip(STRIDES, SHAPES, strict=True))
        for i in range(h)
        for j in range(w)
    ]
    cost_of_stage, cost_class, positives = [0.0, 0.0], 0.0, [[], []]
    assignments = []
    for image, target in enumerate(targets):
        numbers, truths = predictions.boxes[image].tolist(), target.boxes.tolist()
        boxes = [
            [box_of(options.points_to_box, part, x, y, stride, log_scale) for part in (row[:18], row[18:])]
            for row, (_, stride, x, y) in zip(numbers, places, strict=True)
        ]
        first, nearest = [BACKGROUND] * PLACES, [math.inf] * PLACES
        for index, (x0, y0, x1, y1) in enumerate(truths):
            level = int((math.log2((x1 - x0) / 4) + math.log2((y1 - y0) / 4)) / 2)
            level = min(max(level, 3), 5) - 3
            away = [
                math.hypot((x - (x0 + x1) / 2) / (x1 - x0), (y - (y0 + y1) / 2) / (y1 - y0))
                if own == level
                else math.inf
                for own, _, x, y in places
            ]
            place = away.index(min(away))
            if away[place] < nearest[place]:
                first[place], nearest[place] = index, away[place]
        table = [[iou(box, truth) for truth in truths] for box, _ in boxes]
        refined = []
        for row in table:
            best = max(row, default=0)
            refined.append(row.index(best) if best >= 0.5 else IGNORED if best >= 0.4 else BACKGROUND)
        for index in range(len(truths)):
            best = max(row[index] for row in table)
            for place, row in enumerate(table):
                if row[index] == best > 0:
                    refined[place] = index
        assignments.append((first, refined))
        for place, (_, stride, _, _) in enumerate(places):
            for stage, owner in enumerate((first[place], refined[place])):
                if owner < 0:
                    continue
                cost = sum(
                    smooth_l1(abs(a - b) / (options.first_assigner.point_base_scale * stride), 0.11)
                    for a, b in zip(boxes[place][stage], truths[owner], strict=True)
                )
                cost_of_stage[stage] += cost
            if refined[place] == IGNORED:
                continue
            for k, logit in enumerate(predictions.logits[image, place].tolist()):
                p = 1 / (1 + math.exp(-logit))
                true = refined[place] >= 0 and target.labels[refined[place]].item() == k
                cost_class -= 0.25 * (1 - p) ** 2 * math.log(p) if true else 0.75 * p**2 * math.log(1 - p)
        for stage, row in enumerate((first, refined)):
            positives[stage].append(sum(owner >= 0 for owner in row))
    divisors = []
    for counts in positives:
        divisors.append(
            {
                "positives": max(sum(counts), 1),
                "positives_per_image": sum(max(count, 1) for count in counts),
                "moving_average": 0.9 * 100 + 0.1 * max(sum(counts), 1),
            }[options.loss_normalizer]
        )
    losses = {
        "loss_cls": cost_class / divisors[1],
        "loss_pts_init": 0.5 * cost_of_stage[0] / divisors[0],
        "loss_pts_refine": cost_of_stage[1] / divisors[1],
    }
    return losses, assignments


@pytest.mark.parametrize("counts", [(6, 2), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize(
    ("kind", "normalizer"), [*((kind, "positives_per_image") for kind in KINDS), *(("moment", n) for n in NORMALIZERS)]
)
def test_assignments_and_losses_by_loops(kind, normalizer, counts):
    options = RepPointsOptions(num_classes=CLASSES, in_features=LEVELS, points_to_box=kind, loss_normalizer=normalizer)
    detector = options.build(8, STRIDES).double()
    log_scale = [0.0, 0.0]
    if kind == "moment":
        torch.manual_seed(0)
        log_scale = nn.init.normal_(detector.box_form.log_scale, std=0.3).tolist()
    predictions, targets = make_predictions(len(counts)), make_targets(*counts)
    want, assignments = losses_by_loops(options, log_scale, predictions, targets)
    first, refined = detector.criterion.assign(detector, predictions, targets)
    assert [(a.tolist(), b.tolist()) for a, b in zip(first, refined, strict=True)] == assignments
    losses = detector.losses(predictions, targets)
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(want, rel=1e-6)
    assert sum(counts) == 0 or all(value > 0 for value in want.values())
    assert (kind, counts) != ("minmax", (6, 2)) or IGNORED in refined


def test_losses_by_hand():
    """One level of one place at 0, 0, stride 8; one object, 0, 0, 24, 24, which is the place's by either assignment.

    The first points are at -1 and 3 cells, their box -8, -8, 24, 24: two sides of 8 / 32 = 0.25 off, at 0.25 - 0.055
    each; 0.39, times 0.5. Its IoU with the object is 24**2 / 32**2 = 0.5625, a positive. The refined points are at 0
    and 2: two sides 8 / 32 off on the other end, 0.39 again. Logits are 0: the true class costs 0.25 * 0.25 log 2, the
    other two 0.75 * 0.25 log 2 each, 0.4375 log 2 in all.
    """
    options = RepPointsOptions(num_classes=CLASSES, in_features=("p3",), points_to_box="minmax")
    detector = options.build(8, (8,)).double()
    numbers = torch.zeros(1, 1, 36, dtype=torch.float64)
    numbers[0, 0, :18] = torch.tensor([-1.0, -1.0, 3.0, 3.0] + 14 * [0.0])
    numbers[0, 0, 18:] = torch.tensor([0.0, 0.0, 2.0, 2.0] + 14 * [1.0])
    predictions = Predictions(torch.zeros(1, 1, CLASSES, dtype=torch.float64), numbers, None, [(1, 1)])
    targets = [Targets(torch.tensor([[0.0, 0.0, 24.0, 24.0]]), torch.tensor([1]))]
    losses = {key: value.item() for key, value in detector.losses(predictions, targets).items()}
    want = {"loss_cls": 0.4375 * math.log(2), "loss_pts_init": 0.195, "loss_pts_refine": 0.39}
    assert losses == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    detector, targets = build(points_to_box=kind), make_targets(4, 0)
    logits, numbers, _, shapes = make_predictions(2)[:4]

    def total(logits, numbers):
        return sum(detector.losses(Predictions(logits, numbers, None, shapes), targets).values())

    logits.requires_grad_()
    numbers.requires_grad_()
    total(logits, numbers).backward()
    for value in (logits, numbers):
        generator = torch.Generator().manual_seed(3)
        for _ in range(5):
            direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                ends = [
                    total(*((v + sign * 1e-7 * direction) if v is value else v for v in (logits, numbers)))
                    for sign in (-1, 1)
                ]
            slope = (ends[1] - ends[0]) / 2e-7
            torch.testing.assert_close((value.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_an_object_smaller_than_a_cell_and_one_at_the_border():
    detector = build()
    boxes = torch.tensor([[30.2, 30.3, 31.1, 31.9], [0, 0, 5, 48], [60, 44, 64, 48]], dtype=torch.float64)
    predictions = make_predictions(1)
    targets = [Targets(boxes, torch.tensor([0, 1, 2]))]
    first, refined = detector.criterion.assign(detector, predictions, targets)
    assert set(first[0].tolist()) == set(refined[0].tolist()) - {IGNORED} == {BACKGROUND, 0, 1, 2}
    assert all(loss.isfinite() for loss in detector.losses(predictions, targets).values())


def test_detections_are_the_refined_boxes():
    detector = build(points_to_box="minmax", score_thresh_test=0.5)
    predictions = make_predictions(1)
    predictions.logits[:] = -9.0
    predictions.logits[0, 9, 2] = 2.0  # row 1, column 1 of the first level: x = y = 8
    predictions.boxes[0, 9, 18:] = torch.tensor([0.0, 0.0, 1.0, 2.0] + 14 * [0.5])  # y from 0 to 1, x from 0 to 2
    (found,) = detector.detections(predictions, [(HEIGHT, WIDTH)])
    assert found.boxes.tolist() == [[8.0, 8.0, 24.0, 16.0]]
    assert found.labels.tolist() == [2]
    assert found.scores.tolist() == pytest.approx([1 / (1 + math.exp(-2))])


def test_trains_on_one_image_until_it_finds_the_object():
    torch.manual_seed(0)
    detector = RepPointsOptions(num_classes=CLASSES, in_features=LEVELS, num_convs=1).build(8, STRIDES)
    pyramid = {
        name: torch.randn(1, 8, *shape, generator=torch.Generator().manual_seed(i))
        for i, (name, shape) in enumerate(zip(LEVELS, SHAPES, strict=True))
    }
    targets = [Targets(torch.tensor([[10.0, 6.0, 44.0, 38.0]]), torch.tensor([1]))]
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        sum(detector.losses(detector(pyramid), targets).values()).backward()
        optimizer.step()
    (found,) = detector.eval().detections(detector(pyramid), [(HEIGHT, WIDTH)])
    assert found.labels[0] == 1
    assert iou(found.boxes[0].tolist(), targets[0].boxes[0].tolist()) > 0.8


def test_every_parameter_has_a_name_in_mmdetections_checkpoints():
    """Without GroupNorm; the records in tests/detection/originals are of both, and have values."""
    detector = build(num_convs=1)
    theirs = {"bbox_head.moment_transfer": torch.zeros(2)}
    for name, outputs, size in (
        ("cls_convs.0.conv", 8, 3),
        ("reg_convs.0.conv", 8, 3),
        ("reppoints_cls_conv", 8, 3),
        ("reppoints_pts_init_conv", 8, 3),
        ("reppoints_pts_refine_conv", 8, 3),
        ("reppoints_cls_out", CLASSES, 1),
        ("reppoints_pts_init_out", 18, 1),
        ("reppoints_pts_refine_out", 18, 1),
    ):
        theirs[f"bbox_head.{name}.weight"] = torch.zeros(outputs, 8, size, size)
        if name not in ("reppoints_cls_conv", "reppoints_pts_refine_conv"):
            theirs[f"bbox_head.{name}.bias"] = torch.zeros(outputs)
    conversion = convert(theirs)
    assert conversion.left_over == {}
    state = {f"detector.{key}": value.shape for key, value in detector.state_dict().items()}
    assert {key: value.shape for key, value in conversion.state.items()} == state


@pytest.mark.parametrize(("written", "read"), [("positives", "moving_average"), ("moving_average", "positives")])
def test_checkpoints_load_with_another_normalizer(written, read, caplog):
    first, second = build(loss_normalizer=written), build(loss_normalizer=read)
    nn.init.normal_(first.head.logits.weight)
    state = {f"detector.{key}": value for key, value in first.state_dict().items()}
    model = nn.Module()
    model.detector = second
    load_into(model, Conversion(state, "ours"), strict=True, origin="w.pth")
    assert torch.equal(second.head.logits.weight, first.head.logits.weight)
    assert second.criterion.first_normalizer.average == (100 if read == "moving_average" else None)
    second.load_state_dict(first.state_dict())
    assert "Not loaded" not in caplog.text


def test_a_box_form_that_learns_nothing_has_no_parameters():
    assert not list(build(points_to_box="minmax").box_form.parameters())
    assert {leaf.key for leaf in leaves(RepPointsOptions)} >= {"POINTS_TO_BOX", "POINT_BASE_SCALE", "IOU_THRESHOLDS"}
