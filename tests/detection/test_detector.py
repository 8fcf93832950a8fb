import math

import pytest
import torch
from torch import nn

from dyhead.detection import DETECTORS, DenseDetector, DenseHead, Predictions, Targets
from dyhead.detection.anchors import AnchorOptions, Anchors
from dyhead.detection.assigners import IGNORED, CenterAssigner
from dyhead.detection.boxes import Distances
from dyhead.detection.criteria import BorderCriterion, TwoStage
from dyhead.detection.detector import BoxLoss, Inference
from dyhead.detection.fcos import FCOSOptions
from dyhead.detection.losses import FocalLoss
from dyhead.detection.normalizer import KINDS, LossNormalizer
from dyhead.detection.scores import Score
from tests.detection.objects import iou, levels_of, make_boxes

CLASSES, STRIDES, SHAPES = 3, (8, 16, 32), [(6, 8), (3, 4), (1, 1)]
LEVELS = ("p3", "p4", "p5")
HEIGHT, WIDTH = 48, 64
ANCHORS = {
    "DyHeadRetinaNet": AnchorOptions(tuple((3 * s, 4 * s) for s in STRIDES), ((0.5, 1.0, 2.0),), 0.0),
    "DyHeadNoisyAnchors": AnchorOptions(tuple((3 * s, 4 * s) for s in STRIDES), ((0.5, 1.0, 2.0),), 0.0),
    "DyHeadATSS": AnchorOptions(tuple((4 * s,) for s in STRIDES), ((1.0,),), 0.5),
    "DyHeadGFL": AnchorOptions(tuple((4 * s,) for s in STRIDES), ((1.0,),), 0.5),
}
ALL = pytest.mark.parametrize("name", sorted(DETECTORS))
ASSIGNING = pytest.mark.parametrize(
    "name", sorted(DETECTORS.keys() - {"DyHeadAutoAssign", "DyHeadPairedBox", "DyHeadSaccadeNet"})
)


PRODUCT, DEFAULT, DISTANCES = Score("product"), Inference(), Distances()


def make_detector(*, score=PRODUCT, inference=DEFAULT, strides=STRIDES, box_form=DISTANCES):
    """One point a cell, distances in strides, which decode by hand."""
    return DenseDetector(
        DenseHead(4, CLASSES, quality="box"),
        LEVELS[: len(strides)],
        Anchors([[s] for s in strides], [[1.0]], strides, 0.5),
        box_form,
        CenterAssigner(),
        FocalLoss(),
        score,
        LossNormalizer("positives"),
        inference=inference,
    )


def build(name, **options):
    levels = levels_of(name, LEVELS)
    options = {"num_classes": CLASSES, "in_features": levels, "num_convs": 1, **options}
    return DETECTORS[name].options(**options).build(8, STRIDES[: len(levels)], anchors=ANCHORS.get(name))


def make_pyramid(images=2, channels=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return {
        level: torch.randn(images, channels, *shape, dtype=dtype) for level, shape in zip(LEVELS, SHAPES, strict=True)
    }


def make_targets(*counts, dtype=torch.float32):
    boxes = [make_boxes(count, HEIGHT, WIDTH, seed=7 + i, smallest=12, dtype=dtype) for i, count in enumerate(counts)]
    return [Targets(box, torch.arange(len(box)) % CLASSES) for box in boxes]


def make_predictions(images=1, seed=0, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    places = sum(h * w for h, w in shapes)
    return Predictions(
        torch.randn(images, places, CLASSES, generator=generator, dtype=dtype),
        2.5 * torch.rand(images, places, 4, generator=generator, dtype=dtype) - 0.2,
        torch.randn(images, places, generator=generator, dtype=dtype),
        shapes,
    )


def predict(boxes, logits, quality=None):
    """Predictions of a level of stride 8 that has a cell for each of these boxes, all around its point."""
    numbers = [
        [(8 * j + 4 - x0) / 8, (4 - y0) / 8, (x1 - 8 * j - 4) / 8, (y1 - 4) / 8]
        for j, (x0, y0, x1, y1) in enumerate(boxes)
    ]
    quality = [50.0] * len(boxes) if quality is None else quality
    return Predictions(
        torch.tensor([logits], dtype=torch.float64),
        torch.tensor([numbers], dtype=torch.float64),
        torch.tensor([quality], dtype=torch.float64),
        [(1, len(boxes))],
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def detections_by_loops(predictions, image, size, score, inference):
    height, width = size

    def clip(found):
        clipped = []
        for s, label, (x0, y0, x1, y1) in found:
            box = [min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)]
            if box[2] > box[0] and box[3] > box[1]:
                clipped.append((s, label, box))
        return clipped

    def grades(logit, quality):
        p, q = sigmoid(logit), sigmoid(quality)
        s = {"class": p, "product": p * q, "root": math.sqrt(p * q)}[score.score]
        return {"class": p, "score": s}

    found, place = [], 0
    for stride, (h, w) in zip(STRIDES, predictions.shapes, strict=False):
        level = []
        for i in range(h):
            for j in range(w):
                left, top, right, bottom = (max(x, 0) * stride for x in predictions.boxes[image, place].tolist())
                x, y = (j + 0.5) * stride, (i + 0.5) * stride
                for label, logit in enumerate(predictions.logits[image, place].tolist()):
                    grade = grades(logit, predictions.quality[image, place].item())
                    if grade[score.score_thresh_on] > inference.score_thresh:
                        box = [x - left, y - top, x + right, y + bottom]
                        level.append((grade[score.topk_by], (grade["score"], label, box)))
                place += 1
        level.sort(key=lambda entry: -entry[0])
        found += [entry for _, entry in level[: inference.topk]]
    if inference.clip_before_nms:
        found = clip(found)
    kept = []
    for entry in sorted(found, key=lambda entry: -entry[0]):
        if all(entry[1] != other[1] or iou(entry[2], other[2]) <= inference.nms_thresh for other in kept):
            kept.append(entry)
    return clip(kept[: inference.limit])


def assert_found(got, want):
    assert len(want) == len(got.boxes)
    torch.testing.assert_close(got.scores, torch.tensor([s for s, _, _ in want], dtype=got.scores.dtype))
    assert got.labels.tolist() == [label for _, label, _ in want]
    torch.testing.assert_close(got.boxes, torch.tensor([b for _, _, b in want], dtype=got.boxes.dtype).view(-1, 4))


# What is predicted, and where.


class Fixed(nn.Module):
    """A head that says what it was told."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs
        self.quality = outputs[2]

    def forward(self, levels):
        return self.outputs


@pytest.mark.parametrize("has_quality", [True, False])
def test_places_run_by_level_row_cell_and_anchor(has_quality):
    anchors, maps = 2, [(2, 3), (1, 1)]
    torch.manual_seed(0)
    logits, boxes, quality = (
        [torch.randn(2, anchors * numbers, *shape) for shape in maps] for numbers in (CLASSES, 4, 1)
    )
    grid = Anchors([[8, 16]], [[1.0]], (8, 16), 0.5)
    detector = DenseDetector(
        Fixed(logits, boxes, quality if has_quality else None),
        ("p3", "p4"),
        grid,
        Distances(),
        CenterAssigner(),
        FocalLoss(),
        Score("class"),
        LossNormalizer("positives"),
    )
    pyramid = {"p2": torch.zeros(2, 4, 4, 6), "p3": torch.zeros(2, 4, 2, 3), "p4": torch.zeros(2, 4, 1, 1)}
    predictions = detector(pyramid)
    assert predictions.shapes == maps
    place = 0
    for level, (height, width) in enumerate(maps):
        for i in range(height):
            for j in range(width):
                for a in range(anchors):
                    for n in range(2):
                        at = (n, slice(a * CLASSES, (a + 1) * CLASSES), i, j)
                        assert torch.equal(predictions.logits[n, place], logits[level][at])
                        assert torch.equal(predictions.boxes[n, place], boxes[level][n, 4 * a : 4 * a + 4, i, j])
                        if has_quality:
                            assert predictions.quality[n, place] == quality[level][n, a, i, j]
                    center = [(j + 0.5) * grid.strides[level], (i + 0.5) * grid.strides[level]]
                    assert detector.places(predictions).centers[place].tolist() == center
                    place += 1
    assert (predictions.quality is not None) == has_quality
    assert predictions.logits.shape[1] == place


def test_a_detector_that_weighs_places_says_that_it_assigns_none():
    detector = build("DyHeadAutoAssign")
    places = detector.places(detector(make_pyramid()))
    with pytest.raises(ValueError, match="the detector has no assigner; its criterion weighs places for objects"):
        detector.assign(places, make_targets(1, 1))


@pytest.mark.parametrize("as_pairs", [False, True])
def test_levels_that_are_not_read_get_a_gradient_of_0(as_pairs):
    detector = FCOSOptions(num_classes=CLASSES, in_features=("p4",)).build(8, (16,))
    pyramid = {name: level.requires_grad_() for name, level in make_pyramid().items()}
    pyramid["p3"].data.fill_(math.inf)
    given = {name: (level, 2 * level) for name, level in pyramid.items()} if as_pairs else pyramid
    sum(detector.losses(detector(given), make_targets(2, 0)).values()).backward()
    assert pyramid["p4"].grad.any()
    for name in ("p3", "p5"):
        assert torch.equal(pyramid[name].grad, torch.zeros_like(pyramid[name]))


# Losses.


def losses_by_loops(detector, predictions, targets, quality_name, by_centerness=False, weight=1.0, smallest=1e-6):
    logits, numbers, quality = predictions[:3]
    places = detector.places(predictions)
    assigned = detector.assign(places, targets).tolist()
    of_class, of_box, of_quality, total = 0.0, 0.0, 0.0, 0.0
    for image, target in enumerate(targets):
        for place, owner in enumerate(assigned[image]):
            if owner == IGNORED:
                continue
            for k, logit in enumerate(logits[image, place].tolist()):
                p = sigmoid(logit)
                true = owner >= 0 and target.labels[owner].item() == k
                of_class -= 0.25 * (1 - p) ** 2 * math.log(p) if true else 0.75 * p**2 * math.log(1 - p)
            if owner < 0:
                continue
            anchor, box = places.anchors[place], target.boxes[owner]
            cost = detector.box_form.loss(numbers[image, place][None], anchor[None], box[None]).item()
            if quality is not None:
                x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
                x0, y0, x1, y1 = box.tolist()
                across, along = sorted([x - x0, x1 - x]), sorted([y - y0, y1 - y])
                good = math.sqrt(across[0] / across[1] * along[0] / along[1])
                q = sigmoid(quality[image, place].item())
                of_quality -= good * math.log(q) + (1 - good) * math.log(1 - q)
                total += good
                cost *= good if by_centerness else 1
            of_box += cost
    positives = [sum(owner >= 0 for owner in row) for row in assigned]
    divisor = {
        "positives": max(sum(positives), 1),
        "positives_per_image": sum(max(count, 1) for count in positives),
        "moving_average": None,
    }[detector.loss_normalizer.kind]
    if divisor is None:
        divisor = 0.9 * detector.loss_normalizer.average.item() + 0.1 * max(sum(positives), 1)
    box_divisor = max(total, smallest) if by_centerness else divisor
    names = detector.loss_names
    losses = {names[0]: of_class / divisor, names[1]: weight * of_box / box_divisor}
    return losses | ({quality_name: of_quality / divisor} if quality_name else {})


@pytest.mark.parametrize("counts", [(4, 2), (3, 0), (0, 0), (0,)])
@pytest.mark.parametrize("normalizer", KINDS)
@pytest.mark.parametrize(
    ("name", "quality", "how"),
    [
        ("DyHeadFCOS", "loss_fcos_ctr", {}),
        ("DyHeadFCOS", "loss_fcos_ctr", {"weight": 0.5, "by_centerness": True}),
        ("DyHeadRetinaNet", None, {}),
        ("DyHeadATSS", "loss_centerness", {"weight": 2.0, "by_centerness": True, "smallest": 1.0}),
    ],
)
def test_losses_by_loops(name, quality, how, normalizer, counts):
    options = {"loss_normalizer": normalizer}
    if quality:
        options["box_loss"] = BoxLoss(how.get("weight", 1.0), "by_centerness" in how, how.get("smallest", 1e-6))
    detector = build(name, **options).double()
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.1)
    predictions = detector(make_pyramid(len(counts), dtype=torch.float64))
    targets = make_targets(*counts, dtype=torch.float64)
    want = losses_by_loops(detector, predictions, targets, quality, **how)
    got = {key: value.item() for key, value in detector.losses(predictions, targets).items()}
    assert got == pytest.approx(want, rel=1e-6)
    assert sum(counts) == 0 or all(value > 0 for value in got.values())


def test_the_smallest_sum_of_centerness_is_what_box_losses_are_divided_by_at_least():
    detector = build("DyHeadFCOS", box_loss=BoxLoss(1.0, True, 1e-6)).double()
    predictions, targets = detector(make_pyramid(1, dtype=torch.float64)), make_targets(1, dtype=torch.float64)
    small = detector.losses(predictions, targets)["loss_fcos_loc"]
    detector.box_loss = BoxLoss(1.0, True, 1000.0)
    large = detector.losses(predictions, targets)["loss_fcos_loc"]
    positive = detector.assign(detector.places(predictions), targets)[0] >= 0
    centers, box = detector.places(predictions).centers[positive], targets[0].boxes[0]
    sides = torch.cat([centers - box[:2], box[2:] - centers], dim=1)
    good = (
        sides[:, [0, 2]].amin(1) / sides[:, [0, 2]].amax(1) * sides[:, [1, 3]].amin(1) / sides[:, [1, 3]].amax(1)
    ).sqrt()
    torch.testing.assert_close(small * good.sum(), large * 1000)


@ASSIGNING
def test_ignored_places_cost_nothing(name):
    detector = build(name)

    class Ignoring:
        def __call__(self, places, boxes):
            return torch.full((len(places.anchors),), IGNORED)

    detector.assigner = Ignoring()
    if isinstance(detector.criterion, TwoStage):
        detector.criterion.first_assigner = Ignoring()
    if isinstance(detector.criterion, BorderCriterion):
        detector.criterion.border_assigner = Ignoring()
    losses = detector.losses(detector(make_pyramid(1)), make_targets(2))
    assert all(value == 0 for value in losses.values())


@ALL
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (4, 2)])
def test_gradients_reach_every_parameter(name, counts):
    detector = build(name)
    if name == "DyHeadBorderDet":
        nn.init.constant_(detector.head.deltas.bias, 2.0)  # its first boxes overlap no object enough to be refined
    sum(detector.losses(detector(make_pyramid()), make_targets(*counts)).values()).backward()
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # The factor of a level without an object has none to reach it from, nor has what is before a 0; a bias before a
        # norm has none at all.
        without = (
            key == "head.delta_scale"
            or key.startswith("head.aggregation.")
            or "border.point.bias" in key
            or "border.sides.bias" in key
        )
        assert parameter.grad.any() or not sum(counts) or without, key
        if "logits" in key:
            assert parameter.grad.any(), key


@ALL
def test_autocast_computes_losses_in_float32(name):
    detector, targets = build(name, norm="GN", num_convs=0), make_targets(3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = detector(make_pyramid())
        inside = detector.losses(predictions, targets)
        found = detector.eval().detections(predictions, [(HEIGHT, WIDTH)] * 2)
    assert {part.dtype for part in predictions.values} == {torch.float32}
    assert {loss.dtype for loss in inside.values()} == {torch.float32}
    assert {each.boxes.dtype for each in found} == {torch.float32}


class Products:
    """A part of the detector that multiplies matrices, which autocast would do in half precision."""

    def __call__(self, logits, targets):
        return (logits.T @ (logits - targets)).sum()

    def decode(self, numbers, anchors):
        return numbers @ torch.eye(4, dtype=numbers.dtype) + anchors

    def loss(self, numbers, anchors, boxes):
        return (numbers @ (anchors - boxes).T).diagonal()


def test_autocast_does_not_reach_the_parts():
    predictions, targets, size = make_predictions(dtype=torch.float32), make_targets(3), (HEIGHT, WIDTH)
    detector = make_detector(inference=Inference(0.3), box_form=Products())
    detector.class_loss = Products()
    losses, (found,) = detector.losses(predictions, targets), detector.detections(predictions, [size])
    with torch.autocast("cpu", torch.bfloat16):
        inside, (found_inside,) = detector.losses(predictions, targets), detector.detections(predictions, [size])
    assert all(torch.equal(loss, inside[name]) for name, loss in losses.items())
    assert len(found.boxes) > 5
    assert torch.equal(found.boxes, found_inside.boxes)


@ALL
def test_float64_stays_float64(name):
    detector = build(name).double()
    predictions = detector(make_pyramid(dtype=torch.float64))
    losses = detector.losses(predictions, make_targets(3, 0, dtype=torch.float64))
    assert {loss.dtype for loss in losses.values()} == {torch.float64}
    detector.inference = Inference(score_thresh=0.0)
    found = detector.detections(predictions, [(HEIGHT, WIDTH)] * 2)
    assert {part.dtype for each in found for part in (each.boxes, each.scores)} == {torch.float64}


def test_targets_in_another_dtype_are_converted():
    detector = build("DyHeadFCOS").double()
    predictions = detector(make_pyramid(1, dtype=torch.float64))
    (target,) = make_targets(3)
    assert {loss.dtype for loss in detector.losses(predictions, [target]).values()} == {torch.float64}


# Detections.


@pytest.mark.parametrize("clip_before_nms", [False, True])
@pytest.mark.parametrize(
    "score",
    [
        Score("class"),
        Score("product"),
        Score("root"),
        Score("product", score_thresh_on="class"),
        Score("product", topk_by="class"),
        Score("root", score_thresh_on="class", topk_by="class"),
    ],
    ids=lambda score: f"{score.score}-{score.score_thresh_on}-{score.topk_by}",
)
def test_detections_by_loops(score, clip_before_nms):
    inference = Inference(0.3, topk=17, nms_thresh=0.4, limit=25, clip_before_nms=clip_before_nms)
    detector = make_detector(score=score, inference=inference)
    predictions, sizes = make_predictions(3), [(HEIGHT, WIDTH), (30, 50), (48, 20)]
    for image, (found, size) in enumerate(zip(detector.detections(predictions, sizes), sizes, strict=True)):
        want = detections_by_loops(predictions, image, size, score, inference)
        assert_found(found, want)
        assert len(want) > 5


@pytest.mark.parametrize(
    ("topk", "limit", "threshold"), [(1, 100, 0.3), (1000, 3, 0.3), (1000, 100, 0.0), (5, 100, 0.9)]
)
def test_limits_by_loops(topk, limit, threshold):
    score, inference = Score("product"), Inference(threshold, topk, 0.5, limit)
    for seed in range(3):
        predictions = make_predictions(seed=seed)
        (found,) = make_detector(inference=inference).detections(predictions, [(HEIGHT, WIDTH)])
        assert_found(found, detections_by_loops(predictions, 0, (HEIGHT, WIDTH), score, inference))


@pytest.mark.parametrize("clip_before_nms", [False, True])
def test_without_nms_by_loops(clip_before_nms):
    inference = Inference(0.2, nms_thresh=1.0, limit=60, clip_before_nms=clip_before_nms)
    predictions = make_predictions()
    predictions.boxes[:, 5] = predictions.boxes[:, 4] - torch.tensor([-1, 0, 1, 0])  # equal to its neighbor's
    predictions.logits[:, 5] = predictions.logits[:, 4]
    predictions.quality[:, 5] = predictions.quality[:, 4] - 0.1
    (found,) = make_detector(inference=inference).detections(predictions, [(HEIGHT, WIDTH)])
    assert_found(found, detections_by_loops(predictions, 0, (HEIGHT, WIDTH), PRODUCT, inference))
    assert len(found.boxes) > 40


@pytest.mark.parametrize(("shapes", "kernel"), [(SHAPES, 3), (SHAPES, 5), ([(1, 1)], 3), ([(1, 5)], 3)])
def test_peaks_by_loops(shapes, kernel):
    """Two anchors a cell and three classes: a map for each of the six."""
    generator = torch.Generator().manual_seed(0)
    count = 2 * sum(h * w for h, w in shapes)
    logits = torch.randn(1, count, CLASSES, generator=generator, dtype=torch.float64).round(decimals=1)  # some equal
    anchors = Anchors([[8, 16]], [[1.0]], STRIDES[: len(shapes)], 0.5)
    numbers = torch.zeros(1, count, 4, dtype=torch.float64)
    numbers[..., 0] = torch.arange(count)  # tells the places apart
    numbers[..., 2:] = numbers[..., :1] + 1
    predictions = Predictions(logits, numbers, None, shapes)
    inference = Inference(0.3, nms_thresh=1.0, limit=10**6, peak_kernel=kernel)
    detector = DenseDetector(
        DenseHead(4, CLASSES, 2), LEVELS[: len(shapes)], anchors, Corners(), None, None, Score("class"), None,
        inference=inference,
    )  # fmt: skip
    (found,) = detector.detections(predictions, [(10**6, 10**6)])
    want, first = set(), 0
    for height, width in shapes:
        level = logits[0, first : first + 2 * height * width].view(height, width, 2, CLASSES).tolist()
        for i in range(height):
            for j in range(width):
                for a in range(2):
                    for k in range(CLASSES):
                        around = [
                            level[y][x][a][k]
                            for y in range(max(i - kernel // 2, 0), min(i + kernel // 2 + 1, height))
                            for x in range(max(j - kernel // 2, 0), min(j + kernel // 2 + 1, width))
                        ]
                        if level[i][j][a][k] == max(around) and sigmoid(level[i][j][a][k]) > 0.3:
                            want.add((first + (i * width + j) * 2 + a, k))
        first += 2 * height * width
    assert {(int(x), k) for x, k in zip(found.boxes[:, 0].tolist(), found.labels.tolist(), strict=True)} == want
    assert len(found.boxes) == len(want) > 0


@pytest.mark.parametrize("shapes", [[(1, 1)], [(5, 1)], [(2, 2), (1, 1), (1, 1)]])
def test_small_levels_by_loops(shapes):
    score, inference = Score("product"), Inference(0.1, topk=4)
    detector = make_detector(inference=inference, strides=STRIDES[: len(shapes)])
    predictions = make_predictions(shapes=shapes)
    (found,) = detector.detections(predictions, [(40, 40)])
    assert_found(found, detections_by_loops(predictions, 0, (40, 40), score, inference))
    assert len(found.boxes)


def test_nothing_above_the_threshold():
    (found,) = make_detector(inference=Inference(0.999)).detections(make_predictions(), [(HEIGHT, WIDTH)])
    assert [tuple(part.shape) for part in found[:3]] == [(0, 4), (0,), (0,)]
    assert found.labels.dtype == torch.int64


@pytest.mark.parametrize("part", ["boxes", "logits", "quality"])
def test_what_is_nan_is_not_detected_and_spoils_nothing_else(part, caplog):
    detector = make_detector(inference=Inference(0.1, nms_thresh=0.5), strides=(8,))
    boxes = [[0, 0, 8, 8], [0, 0, 8, 8], [8, 0, 16, 8], [9, 0, 16, 8]]
    logits = [[5.0, -9, -9], [3.0, -9, -9], [4.0, -9, -9], [2.0, -9, -9]]
    healthy = predict(boxes, logits)
    getattr(healthy, part)[0, 0] = math.nan
    for _ in range(2):
        (found,) = detector.detections(healthy, [(8, 32)])
        assert found.scores.tolist() == pytest.approx([sigmoid(4), sigmoid(3)])  # the last one overlaps the third
    (record,) = caplog.records  # told once
    assert "predictions are NaN at 1 of 4 places" in record.getMessage()


def test_a_nan_does_not_hide_the_peak_beside_it():
    detector = make_detector(inference=Inference(0.1, peak_kernel=3), strides=(8,))
    boxes = [[8 * j, 0, 8 * j + 8, 8] for j in range(4)]
    predictions = predict(boxes, [[math.nan, -9, -9], [3.0, -9, -9], [2.0, -9, -9], [4.0, -9, -9]])
    (found,) = detector.detections(predictions, [(8, 32)])
    assert found.scores.tolist() == pytest.approx([sigmoid(4), sigmoid(3)])


@pytest.mark.parametrize("topk_by", ["class", "score"])
def test_what_has_no_score_is_not_detected_where_the_class_is_what_is_compared(topk_by):
    score = Score("product", score_thresh_on="class", topk_by=topk_by)
    detector = make_detector(score=score, inference=Inference(0.1, topk=1), strides=(8,))
    predictions = predict([[0, 0, 8, 8], [8, 0, 16, 8]], [[5.0, -9, -9], [3.0, -9, -9]], quality=[math.nan, 0.0])
    (found,) = detector.detections(predictions, [(8, 32)])
    assert found.boxes.tolist() == [[8, 0, 16, 8]]
    assert found.scores.tolist() == pytest.approx([sigmoid(3) / 2])


@pytest.mark.parametrize(("threshold", "count"), [(0.5, 0), (0.4999, 1)])
def test_a_score_at_the_threshold_is_dropped(threshold, count):
    detector = make_detector(score=Score("class"), inference=Inference(threshold), strides=(8,))
    (found,) = detector.detections(predict([[0, 0, 8, 8]], [[0.0, -9.0, -9.0]]), [(8, 8)])
    assert len(found.boxes) == count


@pytest.mark.parametrize(("threshold", "count"), [(0.5, 2), (0.4999, 1)])
def test_boxes_whose_iou_is_the_threshold_both_stay(threshold, count):
    detector = make_detector(inference=Inference(nms_thresh=threshold), strides=(8,))
    predictions = predict([[0, 0, 16, 8], [0, 0, 16, 4]], [[2.0, -9, -9], [1.0, -9, -9]])
    (found,) = detector.detections(predictions, [(16, 16)])
    assert len(found.boxes) == count


def test_the_threshold_is_on_the_score_or_on_the_class():
    predictions = predict([[0, 0, 8, 8]], [[1.0, -9.0, -9.0]], quality=[-2.0])  # 0.73 * 0.12
    for on, count in (("score", 0), ("class", 1)):
        detector = make_detector(score=Score("product", score_thresh_on=on), inference=Inference(0.5), strides=(8,))
        (found,) = detector.detections(predictions, [(8, 8)])
        assert found.scores.tolist() == pytest.approx([sigmoid(1) * sigmoid(-2)] * count)


def test_the_best_are_those_of_the_score_or_of_the_class():
    boxes = [[0, 0, 8, 8], [8, 0, 16, 8]]
    predictions = predict(boxes, [[2.0, -9, -9], [1.0, -9, -9]], quality=[-1.0, 1.0])
    for by, box in (("class", boxes[0]), ("score", boxes[1])):
        detector = make_detector(score=Score("product", topk_by=by), inference=Inference(topk=1), strides=(8,))
        (found,) = detector.detections(predictions, [(8, 16)])
        assert found.boxes.tolist() == [box]


def test_boxes_are_cut_to_the_image_before_or_after_nms():
    # Equal inside the image, far apart beyond it.
    boxes = [[-80, 0, 8, 8], [0, 0, 8, 88]]
    predictions = predict(boxes, [[2.0, -9, -9], [1.0, -9, -9]])
    for before, count in ((False, 2), (True, 1)):
        detector = make_detector(inference=Inference(clip_before_nms=before), strides=(8,))
        (found,) = detector.detections(predictions, [(8, 8)])
        assert found.boxes.tolist() == [[0, 0, 8, 8]] * count


def test_a_box_outside_the_image_counts_until_it_is_cut():
    boxes = [[1, 1, 7, 7], [0, 0, 8, 8]]
    predictions = predict(boxes, [[1.0, -9, -9], [2.0, -9, -9]])
    predictions.boxes[0, 1] = torch.tensor([0.0, 0.5, 2.0, 0.5])  # from x = 12 on, the image ends at 8
    for before, want in ((False, []), (True, [boxes[0]])):
        detector = make_detector(inference=Inference(limit=1, clip_before_nms=before), strides=(8,))
        (found,) = detector.detections(predictions, [(8, 8)])
        assert found.boxes.tolist() == want


class Corners:
    """A box form whose numbers are the box."""

    def decode(self, numbers, anchors):
        return numbers


@pytest.mark.parametrize("many", [False, True])
def test_boxes_of_different_classes_do_not_suppress_each_other(many):
    # Moved by the largest coordinate, 1333, the second lies over the first.
    boxes = [[700.0, 700, 1333, 1333], [-600, -600, 200, 200]]
    logits = [[2.0, -9, -9], [-9, 1.0, -9]]
    boxes += [[10.0 * i, 0, 10.0 * i + 9, 9] for i in range(25, 90) if many]
    logits += [[-9.0, -9, 0.5]] * (len(boxes) - 2)
    predictions = predict(boxes, logits)._replace(boxes=torch.tensor([boxes], dtype=torch.float64))
    detector = make_detector(inference=Inference(nms_thresh=0.5), strides=(8,), box_form=Corners())
    (found,) = detector.detections(predictions, [(1400, 1400)])
    assert found.labels.tolist() == [0, 1] + [2] * (len(boxes) - 2)
    torch.testing.assert_close(found.boxes[:2], torch.tensor([boxes[0], [0, 0, 200, 200]], dtype=torch.float64))


# How detectors are put together.


@pytest.mark.parametrize(
    ("score", "box_loss", "what"),
    [
        ("product", BoxLoss(), "SCORE product"),
        ("root", BoxLoss(), "SCORE root"),
        ("class", BoxLoss(by_centerness=True), "BBOX_REG_LOSS_BY_CENTERNESS True"),
    ],
)
def test_what_needs_a_quality_needs_a_head_that_predicts_one(score, box_loss, what):
    with pytest.raises(ValueError, match=f"{what}: the detector predicts no quality"):
        DenseDetector(
            DenseHead(4, CLASSES),
            ("p3",),
            Anchors([[8]], [[1.0]], (8,)),
            DISTANCES,
            CenterAssigner(),
            FocalLoss(),
            Score(score),
            LossNormalizer("positives"),
            box_loss=box_loss,
        )


@pytest.mark.parametrize("strides", [(8,), (8, 16)])
def test_a_detector_has_as_many_levels_as_asked_for(strides):
    detector = FCOSOptions(num_classes=CLASSES, in_features=LEVELS[: len(strides)]).build(8, strides)
    predictions = detector(make_pyramid())
    assert predictions.shapes == SHAPES[: len(strides)]
    losses = detector.losses(predictions, make_targets(3, 0))
    assert all(loss.isfinite() for loss in losses.values())


def test_options_reach_their_parts():
    options = FCOSOptions(
        num_classes=CLASSES,
        in_features=("p3",),
        class_loss=FocalLoss(0.5, 1.0),
        score_thresh_test=0.2,
        topk_candidates_test=7,
        nms_thresh_test=0.3,
        clip_boxes="before_nms",
        centerness_on="class",
        scale_per_level=True,
    )
    detector = options.build(8, (8,), detections_per_image=9)
    assert detector.inference == Inference(0.2, 7, 0.3, 9, True)
    assert detector.class_loss == FocalLoss(0.5, 1.0)
    assert detector.head.quality_from == "class"
    assert detector.head.delta_scale.shape == (1,)
    assert detector.loss_normalizer.average == 300
