"""The paired-box model: losses against loops, what is pooled, proposals, and what NMS compares."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from dyhead.detection import DETECTORS, Targets
from dyhead.detection.anchors import AnchorOptions
from dyhead.detection.criteria.paired import sample
from dyhead.detection.roi.paired import PairedHead, cells_inside
from tests.detection.assigners.test_paired import anchors_by_loops
from tests.detection.objects import iou

OPTIONS = DETECTORS["DyHeadPairedBox"].options
ANCHORS = AnchorOptions(((20.0,), (40.0,)), ((1.0, 2.0),), 0.5)
WHOLE = torch.tensor([[5.0, 6, 30, 40], [20, 8, 58, 44]])
VISIBLE = torch.tensor([[5.0, 6, 19, 40], [20, 8, 58, 30]])
OBJECTS = [
    Targets(WHOLE, torch.tensor([1, 0]), VISIBLE),
    Targets(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 4)),
]


def build(**changed):
    torch.manual_seed(0)
    changed = {"num_classes": 3, "in_features": ("p3", "p4"), "fc_dim": 16, "score_thresh_test": 0.0, **changed}
    detector = OPTIONS(**changed).build(4, [8, 16], anchors=ANCHORS).double()
    for parameter in detector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return detector


def pyramid(images=2):
    generator = torch.Generator().manual_seed(1)
    sizes = {"p3": (6, 8), "p4": (3, 4)}
    return {
        name: torch.randn(images, 4, *size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }


def deltas(box, anchor, weights):
    (x0, y0, x1, y1), (a0, b0, a1, b1) = box, anchor
    w, h, aw, ah = x1 - x0, y1 - y0, a1 - a0, b1 - b0
    moves = ((x0 + x1 - a0 - a1) / 2 / aw, (y0 + y1 - b0 - b1) / 2 / ah, math.log(w / aw), math.log(h / ah))
    return [weight * move for weight, move in zip(weights, moves, strict=True)]


def l1(numbers, box, anchor, weights):
    return sum(abs(n - t) for n, t in zip(numbers, deltas(box, anchor, weights), strict=True))


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_the_losses_are_those_of_loops(scale):
    # So many that all count, and no need to draw lots.
    limits = {"rpn_batch_size_per_image": 5000, "batch_size_per_image": 3000, "positive_fraction": 1.0}
    criterion = replace(OPTIONS().criterion, **limits, negative_visible_scale=scale, visible_loss_weight=0.5)
    detector = build(criterion=criterion, prior_prob=0.2)
    predictions = detector(pyramid())
    losses = detector.losses(predictions, OBJECTS)

    anchors = detector.places(predictions).anchors
    totals = dict.fromkeys(losses, 0.0)
    regions = 0
    for i, (whole, labels, visible) in enumerate(OBJECTS):
        whole, visible = whole.double(), visible.double()
        if len(whole):
            assigned = anchors_by_loops(criterion.anchor_assigner, anchors, whole, visible)
        else:
            assigned = [-1] * len(anchors)
        assert len(whole) == 0 or max(assigned) >= 0
        for r, owner in enumerate(assigned):
            p = 1 / (1 + math.exp(-predictions.logits[i, r, 0].item()))
            if owner >= 0:
                totals["loss_rpn_cls"] -= math.log(p)
                numbers, anchor = predictions.boxes[i, r].tolist(), anchors[r].tolist()
                totals["loss_rpn_whole"] += l1(numbers[:4], whole[owner].tolist(), anchor, (1, 1, 1, 1))
                totals["loss_rpn_visible"] += l1(numbers[4:], visible[owner].tolist(), anchor, (1, 1, 1, 1))
            elif owner == -1:
                totals["loss_rpn_cls"] -= math.log(1 - p)
        pairs = torch.cat([detector.proposals(predictions, i), torch.cat([whole, visible], dim=1)])
        logits, numbers = detector.regions({k: v[i : i + 1] for k, v in predictions.levels.items()}, [pairs])
        for pair, logit, own in zip(pairs.tolist(), logits, numbers.tolist(), strict=True):
            fits = [
                (iou(f, pair[:4]), -k)
                for k, (f, v) in enumerate(zip(whole.tolist(), visible.tolist(), strict=True))
                if iou(f, pair[:4]) >= 0.5 and iou(v, pair[4:]) >= 0.5
            ]
            regions += 1
            k = -max(fits)[1] if fits else None
            totals["loss_cls"] -= F.log_softmax(logit, dim=0)[3 if k is None else labels[k]].item()
            if k is not None:
                totals["loss_whole"] += l1(own[:4], whole[k].tolist(), pair[:4], (10, 10, 5, 5))
                totals["loss_visible"] += l1(own[4:], visible[k].tolist(), pair[4:], (10, 10, 5, 5))
            elif scale:
                x, y = (pair[0] + pair[2]) / 2, (pair[1] + pair[3]) / 2
                w, h = scale * (pair[2] - pair[0]) / 2, scale * (pair[3] - pair[1]) / 2
                totals["loss_visible"] += l1(own[4:], [x - w, y - h, x + w, y + h], pair[4:], (10, 10, 5, 5))
    for key, loss in losses.items():
        weight = 0.5 if key.endswith("visible") else 1
        divisor = 2 * 5000 if "rpn" in key else regions
        assert loss.item() == pytest.approx(weight * totals[key] / divisor, rel=1e-9), key
        assert loss > 0


def test_gradients_are_those_of_finite_differences():
    # Fixed proposals: those that NMS chooses depend on the numbers, but have no gradient.
    criterion = replace(OPTIONS().criterion, rpn_batch_size_per_image=5000, batch_size_per_image=5000)
    detector = build(criterion=criterion)
    fixed = torch.cat([WHOLE, VISIBLE], dim=1).double() + torch.tensor([1.0, 2, 1, -2, 1, 2, -1, -2])
    detector.proposals = lambda predictions, image, size=None: fixed
    generator = torch.Generator().manual_seed(4)
    parameters = [detector.head.deltas.bias, detector.regions.bbox_pred.weight, detector.head.logits.bias]
    losses = detector.losses(detector(pyramid()), OBJECTS)
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        step = 1e-6 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
                values.append(sum(detector.losses(detector(pyramid()), OBJECTS).values()).item())
                parameter.sub_(sign * step)
        assert (values[0] - values[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def test_without_visible_boxes_objects_are_wholly_visible():
    detector = build(criterion=replace(OPTIONS().criterion, rpn_batch_size_per_image=5000, batch_size_per_image=5000))
    predictions = detector(pyramid())
    got = detector.losses(predictions, [Targets(t.boxes, t.labels) for t in OBJECTS])
    want = detector.losses(predictions, [Targets(t.boxes, t.labels, t.boxes) for t in OBJECTS])
    other = detector.losses(predictions, OBJECTS)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}
    assert got["loss_rpn_visible"] != other["loss_rpn_visible"]


@pytest.mark.parametrize("fusion", ["concat", "masked"])
def test_both_regions_are_pooled_and_put_side_by_side(fusion):
    torch.manual_seed(0)
    head = PairedHead(4, {"p3": 8}, 2, resolution=3, sampling_ratio=2, num_fc=1, fc_dim=5, fusion=fusion)
    level = torch.randn(1, 4, 10, 12)
    pairs = torch.tensor([[8.0, 8, 56, 40, 8, 8, 40, 24], [10, 4, 90, 70, 20, 30, 80, 60]])
    logits, numbers = head({"p3": level}, [pairs])
    for i, pair in enumerate(pairs):
        whole, visible = (roi_align(level, [box[None]], 3, 1 / 8, 2, True)[0] for box in (pair[:4], pair[4:]))
        if fusion == "masked":
            for row in range(3):
                for column in range(3):
                    x = pair[0] + (pair[2] - pair[0]) * (column + 0.5) / 3
                    y = pair[1] + (pair[3] - pair[1]) * (row + 0.5) / 3
                    if not (pair[4] <= x <= pair[6] and pair[5] <= y <= pair[7]):
                        whole[:, row, column] = 0
        features = head.fcs[0](torch.cat([whole.flatten(), visible.flatten()])).relu()
        torch.testing.assert_close(logits[i], head.cls_score(features))
        torch.testing.assert_close(numbers[i], head.bbox_pred(features))
    logits, numbers = head({"p3": level}, [pairs[:0]])
    assert (logits.shape, numbers.shape) == ((0, 3), (0, 8))


def test_cells_of_the_visible_part():
    pairs = torch.tensor([[0.0, 0, 40, 40, 0, 0, 20, 40], [0, 0, 40, 40, 16, 16, 24, 24]])
    assert cells_inside(pairs, 2).tolist() == [[[1, 0], [1, 0]], [[0, 0], [0, 0]]]


def test_levels_in_half_precision_are_read_as_under_autocast():
    head = PairedHead(4, {"p3": 8}, 2, resolution=3, fc_dim=8)
    level, pairs = torch.randn(1, 4, 10, 12), [torch.tensor([[8.0, 8, 56, 40, 8, 8, 40, 24]])]
    with torch.autocast("cpu", torch.bfloat16):
        half = level.to(torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        logits, numbers = head({"p3": half}, pairs)
    assert logits.dtype == numbers.dtype == torch.float32
    torch.testing.assert_close(logits, head({"p3": level}, pairs)[0], rtol=0.05, atol=0.01)


def given(detector, pairs, logits):
    """The detector with these proposals, classes of which are certain as these logits say, and boxes that stay."""
    pairs = torch.tensor(pairs, dtype=torch.float64)
    detector.proposals = lambda predictions, image, size=None: pairs
    detector.regions.forward = lambda levels, proposals: (
        torch.tensor(logits, dtype=torch.float64),
        torch.zeros(len(pairs), 8, dtype=torch.float64),
    )
    return detector.detections(detector(pyramid(1)), [(48, 64)])[0]


# Two objects, one behind the other, of which the second is found twice.
CROWD = [[0, 0, 40, 40, 0, 0, 40, 40], [4, 0, 44, 40, 41, 0, 44, 40], [5, 0, 45, 40, 41, 0, 45, 40]]


@pytest.mark.parametrize(("nms", "kept"), [("visible", [0, 2]), ("whole", [0])])
def test_nms_compares_visible_boxes_or_whole_ones(nms, kept):
    logits = [[9.0, 0, 0, 0], [3, 0, 0, 0], [5, 0, 0, 0]]
    found = given(build(nms=nms, score_thresh_test=0.5), CROWD, logits)
    assert found.boxes.tolist() == [CROWD[i][:4] for i in kept]
    assert found.visible_boxes.tolist() == [CROWD[i][4:] for i in kept]
    assert found.labels.tolist() == [0] * len(kept)
    scores = torch.tensor(logits, dtype=torch.float64).softmax(dim=1)[kept, 0]
    torch.testing.assert_close(found.scores, scores)


def test_pairs_are_cut_to_the_image_and_dropped_if_nothing_visible_is_left():
    pairs = [[50, 30, 80, 70, 60, 30, 80, 60], [40, 10, 90, 40, 70, 10, 90, 40]]
    found = given(build(score_thresh_test=0.5), pairs, [[9.0, 0, 0, 0], [9, 0, 0, 0]])
    assert found.boxes.tolist() == [[50, 30, 64, 48]]
    assert found.visible_boxes.tolist() == [[60, 30, 64, 48]]


@pytest.mark.parametrize("nms", ["visible", "whole"])
def test_proposals_are_the_best_pairs_after_nms_on_each_level(nms):
    detector = build(proposals=30, topk_candidates_test=20, proposal_nms=nms, proposal_nms_thresh=0.4)
    predictions = detector(pyramid())
    size = (44, 60)
    got = detector.proposals(predictions, 1, size)
    anchors, found, first = detector.places(predictions).anchors, [], 0
    for level, count in enumerate((2 * 48, 2 * 12)):
        scores = predictions.logits[1, first : first + count, 0]
        for r in scores.sort(descending=True).indices[:20].tolist():
            pair = []
            for half in (slice(0, 4), slice(4, 8)):
                dx, dy, dw, dh = predictions.boxes[1, first + r, half].tolist()
                x0, y0, x1, y1 = anchors[first + r].tolist()
                w, h = x1 - x0, y1 - y0
                x, y, w, h = (x0 + x1) / 2 + dx * w, (y0 + y1) / 2 + dy * h, w * math.exp(dw), h * math.exp(dh)
                corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                pair += [min(max(v, 0), limit) for v, limit in zip(corners, (60, 44) * 2, strict=True)]
            if pair[2] > pair[0] and pair[3] > pair[1] and pair[6] > pair[4] and pair[7] > pair[5]:
                found.append((scores[r].item(), level, pair))
        first += count
    part = slice(4, 8) if nms == "visible" else slice(0, 4)
    kept = []
    for score, level, pair in sorted(found, key=lambda entry: -entry[0]):
        if all(level != other[1] or iou(pair[part], other[2][part]) <= 0.4 for other in kept):
            kept.append((score, level, pair))
    want = torch.tensor([pair for _, _, pair in kept[:30]], dtype=torch.float64)
    assert 5 < len(want) < len(found)
    torch.testing.assert_close(got, want)


def test_places_of_nan_are_no_proposals():
    detector = build()
    predictions = detector(pyramid())
    for key in ("logits", "boxes"):
        broken = getattr(predictions, key).detach().clone()
        broken[:, ::2] = torch.nan
        assert detector.proposals(predictions._replace(**{key: broken}), 0).isfinite().all()
    nothing = predictions._replace(logits=torch.full_like(predictions.logits, torch.nan))
    assert len(detector.proposals(nothing, 0)) == 0
    assert len(detector.detections(nothing, [(48, 64)] * 2)[0].boxes) == 0


def test_samples_are_random_and_of_the_size_that_is_asked_for():
    assigned = torch.tensor([0, 3, 1, 2, 0, *[-1] * 20, *[-2] * 7])
    torch.manual_seed(0)
    drawn = [sample(assigned, 8, 0.25) for _ in range(20)]
    for own in drawn:
        assert (assigned[own] >= 0).sum() == 2
        assert (assigned[own] == -1).sum() == 6
        assert len(own.unique()) == 8
    assert len({tuple(own.sort().values.tolist()) for own in drawn}) > 10
    assert sample(assigned, 1000, 0.5).tolist() == list(range(25))
    assert sample(assigned[5:], 8, 0.25).shape == (8,)  # no objects: background in their place
